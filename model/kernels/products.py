"""Products of training on a CPU: float32 by the faster of torch's two libraries, gradients of weights in C.

torch hands float32 products to MKL, which on processors that are not Intel's is less than half as fast as oneDNN (AMD
Zen 5: 178 against 397 GFLOP/s). For gradients of weights, the slowest case of both, `products.c` is faster.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

import model.kernels as kernels
from model.kernels.compiled import multiplies, opener, readable, scratch

LANES, TILE = 16, 8
LEAST_ROWS = 64  # with fewer, generating oneDNN's kernels for a new shape costs more than they save

library = opener("products.c", weight_gradient="ttltlllliti", multiply="tttilllti", scratch="li>")


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `LinearProduct` trains faster: all in float32, or under autocast the gradient of the weight."""
    if not torch.is_grad_enabled() or type(weight) is not nn.Parameter:
        return False
    if faster(x):
        return True
    trains = weight.requires_grad and weight.dtype == torch.float32
    half = x.dtype == torch.bfloat16 and torch.is_autocast_enabled("cpu")
    return half and trains and bias is None and in_c(x) and not any(size % LANES for size in weight.shape)


def faster(x: Tensor) -> bool:
    """Return whether `product` is worth it for x (..., features): float32 on a CPU not Intel's, and rows enough."""
    if not readable(x) or x.dtype != torch.float32:
        return False
    return x.numel() >= LEAST_ROWS * x.shape[-1] and not torch.is_autocast_enabled("cpu") and not_intel()


def product(a_NI: Tensor, b_OI: Tensor) -> Tensor:
    """a b^T, (N, O), by oneDNN where `faster`, else by torch."""
    if faster(a_NI):
        # oneDNN takes a reference loop, a hundred times slower, for a b that is a part of something wider.
        b_OI = b_OI if b_OI.is_contiguous() or b_OI.t().is_contiguous() else b_OI.contiguous()
        return torch.ops.mkldnn._linear_pointwise(a_NI, b_OI, None, "none", [], "")
    return a_NI @ b_OI.t()


def in_c(x: Tensor) -> bool:
    """Return whether `products.c` is the fastest for products with x (..., features)."""
    if not readable(x) or x.numel() < LEAST_ROWS * x.shape[-1] or (x.dtype == torch.float32 and not not_intel()):
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
    if gradient_fits(to_OI, grad_NO, x_NI):
        return gradient_in_c(to_OI, grad_NO, x_NI, add=False)
    return to_OI.copy_(product(grad_NO.t(), x_NI.t()))


def add_gradient(to_OI: Tensor, grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """to += grad^T x, summed in float32; returns `to`."""
    if gradient_fits(to_OI, grad_NO, x_NI):
        return gradient_in_c(to_OI, grad_NO, x_NI, add=True)
    if kernels.on_cuda(grad_NO) and grad_NO.dtype == to_OI.dtype:
        return to_OI.addmm_(grad_NO.t(), x_NI)
    return to_OI.add_(product(grad_NO.t(), x_NI.t()))


def gradient_fits(to_OI: Tensor, grad_NO: Tensor, x_NI: Tensor) -> bool:
    """Return whether `gradient_in_c` computes with these."""
    rows = all(x.stride(1) == 1 and not x.shape[1] % LANES and x.dtype == grad_NO.dtype for x in (grad_NO, x_NI))
    return rows and to_OI.dtype == torch.float32 and to_OI.is_contiguous() and in_c(grad_NO) and readable(x_NI)


def product_in_c(out_NO: Tensor, a_NI: Tensor, b_OI: Tensor) -> Tensor:
    """`multiply` of products.c."""
    turned, sizes = b_OI.is_contiguous(), (*a_NI.shape, len(b_OI))
    library(a_NI.dtype).multiply(out_NO, a_NI, b_OI, turned, *sizes, scratch(b_OI.numel()), torch.get_num_threads())
    return out_NO


def gradient_in_c(to_OI: Tensor, grad_NO: Tensor, x_NI: Tensor, add: bool) -> Tensor:
    """`weight_gradient` of products.c."""
    built, threads = library(grad_NO.dtype), torch.get_num_threads()
    memory = scratch(threads * built.scratch(to_OI.shape[0], threads))
    rows = (grad_NO, grad_NO.stride(0), x_NI, x_NI.stride(0), len(x_NI))
    built.weight_gradient(to_OI, *rows, *to_OI.shape, add, memory, threads)
    return to_OI


class LinearProduct(torch.autograd.Function):
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
def not_intel() -> bool:
    """Return whether this is another x86 with oneDNN, by its name: timed, a resumed run might choose otherwise."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "vendor_id" in facts and "GenuineIntel" not in facts
