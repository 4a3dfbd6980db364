"""Products of training on CPU: float32 by the faster of torch's two libraries, gradients of weights in C.

torch hands float32 products to MKL, which on processors that are not Intel's runs at less than half the speed of oneDNN
(AMD Zen 5: 178 against 397 GFLOP/s). Both compute in float32; only the order of the sums differs. In bfloat16 torch
itself takes oneDNN. For gradients of weights, the slowest case of both, `products.c` is faster in either type.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.compiled import floats, multiplies, opened

SOURCE = Path(__file__).with_name("products.c")
LANES, TILE = 16, 8
LEAST_ROWS = 64  # with fewer, generating oneDNN's kernels for a new shape costs more than they save


class Linear(nn.Linear):
    """`nn.Linear`, in training by `product` where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        if not (torch.is_grad_enabled() and type(self.weight) is nn.Parameter and self._by_product(x)):
            return F.linear(x, self.weight, self.bias)
        out = _Linear.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias

    def _by_product(self, x: Tensor) -> bool:
        """In float32 where that is faster; in bfloat16 under autocast for the gradient of the weight."""
        if faster(x):
            return True
        trains = self.weight.requires_grad and self.weight.dtype == torch.float32
        half = x.dtype == torch.bfloat16 and torch.is_autocast_enabled("cpu")
        return half and trains and self.bias is None and in_c(x) and not any(size % LANES for size in self.weight.shape)


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


def in_c(x: Tensor) -> bool:
    """Whether `products.c` is the quick way for products with x (..., features)."""
    if x.device.type != "cpu" or type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or x.numel() < LEAST_ROWS * x.shape[-1]:
        return False
    if x.dtype == torch.float32 and not _not_intel():
        return False
    return multiplies(x.dtype) and library(x.dtype) is not None


def product_into(out_NO: Tensor, a_NI: Tensor, b_OI: Tensor) -> Tensor:
    """out = a b^T, without a copy; returns `out`. oneDNN has no way to write float32 into place."""
    dense = all(x.is_contiguous() for x in (out_NO, a_NI)) and (b_OI.is_contiguous() or b_OI.t().is_contiguous())
    lanes = not len(a_NI) % TILE and not any(size % LANES for size in b_OI.shape)
    if a_NI.dtype == torch.float32 and in_c(a_NI) and b_OI.dtype == out_NO.dtype == a_NI.dtype and dense and lanes:
        return product_in_c(out_NO, a_NI, b_OI)
    return out_NO.copy_(product(a_NI, b_OI)) if faster(a_NI) else torch.mm(a_NI, b_OI.t(), out=out_NO)


def gradient_into(to_OI: Tensor, grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """to = grad^T x, summed in float32; returns `to`."""
    if _suits(to_OI, grad_NO, x_NI):
        return gradient_in_c(to_OI, grad_NO, x_NI, add=False)
    return to_OI.copy_(product(grad_NO.t(), x_NI.t()))


def add_gradient(to_OI: Tensor, grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """to += grad^T x, summed in float32; returns `to`."""
    if _suits(to_OI, grad_NO, x_NI):
        return gradient_in_c(to_OI, grad_NO, x_NI, add=True)
    return to_OI.add_(product(grad_NO.t(), x_NI.t()))


def _suits(to_OI: Tensor, grad_NO: Tensor, x_NI: Tensor) -> bool:
    rows = all(x.stride(1) == 1 and not x.shape[1] % LANES and x.dtype == grad_NO.dtype for x in (grad_NO, x_NI))
    return rows and to_OI.dtype == torch.float32 and to_OI.is_contiguous() and in_c(grad_NO) and type(x_NI) is Tensor


def product_in_c(out_NO: Tensor, a_NI: Tensor, b_OI: Tensor) -> Tensor:
    """`multiply` of products.c."""
    built, memory = library(a_NI.dtype), floats(b_OI.numel() + LANES)
    places = out_NO.data_ptr(), a_NI.data_ptr(), b_OI.data_ptr(), b_OI.is_contiguous()
    ahead = -memory.data_ptr() % 64  # rows begin with a line of the cache
    built.multiply(*places, *a_NI.shape, len(b_OI), memory.data_ptr() + ahead, torch.get_num_threads())
    return out_NO


def gradient_in_c(to_OI: Tensor, grad_NO: Tensor, x_NI: Tensor, add: bool) -> Tensor:
    """`weight_gradient` of products.c."""
    built, threads = library(grad_NO.dtype), torch.get_num_threads()
    memory = floats(threads * built.scratch(to_OI.shape[0], threads) + LANES)
    places = to_OI.data_ptr(), grad_NO.data_ptr(), grad_NO.stride(0), x_NI.data_ptr(), x_NI.stride(0)
    ahead = -memory.data_ptr() % 64
    built.weight_gradient(*places, len(x_NI), *to_OI.shape, add, memory.data_ptr() + ahead, threads)
    return to_OI


@lru_cache(maxsize=2)
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """products.c compiled for numbers of this type; None where that cannot be."""
    built = opened(SOURCE, dtype)
    if built is None:
        return None
    place, whole, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    built.weight_gradient.argtypes = [place, place, whole, place, whole, whole, whole, whole, flag, place, flag]
    built.multiply.argtypes = [place, place, place, flag, whole, whole, whole, place, flag]
    built.weight_gradient.restype = built.multiply.restype = None
    built.scratch.argtypes, built.scratch.restype = [whole, flag], whole
    return built


class _Linear(torch.autograd.Function):
    """x W^T and its gradients: in the type of x, but that of W in float32, as W is."""

    @staticmethod
    def forward(ctx, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        weight = weight_OI.to(x_NI.dtype)
        ctx.save_for_backward(x_NI if ctx.needs_input_grad[1] else None, weight)
        return product(x_NI, weight)

    @staticmethod
    def backward(ctx, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NI, weight_OI = ctx.saved_tensors
        to_x = product(grad_NO, weight_OI.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, None
        return to_x, gradient_into(grad_NO.new_empty(weight_OI.shape, dtype=torch.float32), grad_NO, x_NI)


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
