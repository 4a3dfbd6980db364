"""Fast kernels: C for CPUs, compiled on the machine at hand, each file beside its caller; tensors in, tensors out."""

from torch import Tensor


def on_cuda(x: Tensor) -> bool:
    """Return whether x takes the branch for CUDA.

    Every choice asks here. A CPU computes that branch too, operation by operation: tests answer yes for its tensors.
    """
    return x.is_cuda


def on_cpu(x: Tensor) -> bool:
    """Return whether x takes the branch for CPUs, whose choices read numbers and call C."""
    return x.device.type == "cpu" and not on_cuda(x)
