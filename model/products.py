"""Float32 products on CPU by the faster of torch's two libraries.

torch hands them to MKL, which on processors that are not Intel's runs at less than half the speed of oneDNN (AMD Zen 5:
178 against 397 GFLOP/s). Both compute in float32; only the order of the sums differs. In bfloat16 torch itself takes
oneDNN.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_ROWS = 64  # with fewer, generating oneDNN's kernels for a new shape costs more than they save


class Linear(nn.Linear):
    """`nn.Linear`, in training by `product` where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        if not (torch.is_grad_enabled() and faster(x) and type(self.weight) is nn.Parameter):
            return F.linear(x, self.weight, self.bias)
        out = _Linear.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


def faster(x: Tensor) -> bool:
    """Whether `product` is worth it for x (..., features): float32 on a CPU that is not Intel's, and rows enough."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    return x.numel() >= LEAST_ROWS * x.shape[-1] and not torch.is_autocast_enabled("cpu") and _not_intel()


def product(a_NI: Tensor, b_OI: Tensor) -> Tensor:
    """a b^T, (N, O), by oneDNN where `faster`, else by torch."""
    if faster(a_NI):
        # oneDNN takes a reference loop, a hundred times slower, for a b that is a part of something wider.
        b_OI = b_OI if b_OI.is_contiguous() or b_OI.t().is_contiguous() else b_OI.contiguous()
        return torch.ops.mkldnn._linear_pointwise(a_NI, b_OI, None, "none", [], "")
    return a_NI @ b_OI.t()


class _Linear(torch.autograd.Function):
    """x W^T and its gradients, each by `product`."""

    @staticmethod
    def forward(ctx, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI if ctx.needs_input_grad[1] else None, weight_OI)
        return product(x_NI, weight_OI)

    @staticmethod
    def backward(ctx, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NI, weight_OI = ctx.saved_tensors
        to_x = product(grad_NO, weight_OI.t()) if ctx.needs_input_grad[0] else None
        to_weight = product(grad_NO.t(), x_NI.t()) if ctx.needs_input_grad[1] else None
        return to_x, to_weight


@lru_cache(maxsize=1)
def _not_intel() -> bool:
    """On x86 with oneDNN, by the processor's own word: never measured, so that a resumed run takes the same way."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "vendor_id" in facts and "GenuineIntel" not in facts
