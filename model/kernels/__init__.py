"""Fast kernels: C for CPUs, compiled on the machine at hand, each file beside its caller; tensors in, tensors out."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

FILES = ("attention", "causal", "decode", "fused", "grouped", "grouped_cuda", "products", "report")


def __getattr__(name: str) -> ModuleType:
    """Find a file of kernels when an operation first takes it: `kernels.fused`."""
    if name not in FILES:
        raise AttributeError(f"model.kernels: there is no {name}")
    return import_module(f"{__name__}.{name}")  # which makes it an attribute: nothing comes here twice


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
