"""Fast kernels: C for CPUs, compiled on the machine at hand, each file beside its caller; tensors in, tensors out."""

import torch
from torch import Tensor


def on_cuda(x: Tensor) -> bool:
    """Return whether x takes the branch for CUDA.

    Every choice asks here. A CPU computes that branch too, operation by operation: tests answer yes for its tensors.
    """
    return x.is_cuda


def on_cpu(x: Tensor) -> bool:
    """Return whether x takes the branch for CPUs, whose choices read numbers and call C."""
    return x.device.type == "cpu" and not on_cuda(x)


def capability(device: torch.device) -> int:
    """Return the first number of an NVIDIA card's compute capability: 8 of A100, 30x0 and 40x0, 9 of H100; else 0.

    A CPU that computes the branch for CUDA stands for an H100.
    """
    if device.type == "cpu":
        return 9
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and torch.version.hip is None else 0


# torch.compiler.assume_constant_result sets this after importing torch._dynamo, which takes as long as torch itself.
capability._dynamo_marked_constant = True
