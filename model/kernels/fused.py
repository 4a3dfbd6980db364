"""SwiGLU, RMSNorm, causal softmax, cross entropy, sums of rows and AdamW on CPU, each in one pass: `fused.c`, compiled.

Everywhere else, and without a C compiler, PyTorch computes the same in more passes: callers ask `fits` first.
"""

from __future__ import annotations

import ctypes
import subprocess
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.compiled import compiled, floats, integers

SOURCE = Path(__file__).with_name("fused.c")
LANES = 16  # rows are whole numbers of so many
TYPES = (torch.float32, torch.bfloat16)


def available(x: Tensor) -> bool:
    """Whether `fused.c` computes on this device and in this type."""
    if x.device.type != "cpu" or x.dtype not in TYPES or torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    return library(x.dtype) is not None


def fits(x: Tensor, *others: Tensor) -> bool:
    """Whether it computes with x (..., n) and others like it: rows of whole lanes, evenly apart."""
    if not available(x) or x.shape[-1] % LANES or not x.numel() or stride_of(x) is None:
        return False
    return all(type(y) is Tensor and y.dtype == x.dtype and stride_of(y) == stride_of(x) for y in others)


def stride_of(x: Tensor) -> int | None:
    """How far apart the rows (last axis) of x are, if one number says it for all of them."""
    if x.dim() < 2 or x.stride(-1) != 1:
        return None
    stride, rows = None, 1
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:  # whose stride means nothing
            continue
        stride = step if stride is None else stride
        if step != stride * rows:
            return None
        rows *= size
    return x.shape[-1] if stride is None else stride


class FusedSwiGLU(torch.autograd.Function):
    """silu(gate) * up * weight, keeping only its inputs.

    weight: (...) or None; parts: gate_up (..., 2 * n) = [gate | up], or gate and up, (..., n) each.
    """

    @staticmethod
    def forward(ctx, weight: Tensor | None, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *parts)
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        out = gate.new_empty(gate.shape)
        weight = None if weight is None else weight.contiguous()
        rows, inner = gate.numel() // gate.shape[-1], gate.shape[-1]
        places = (address(tensor) for tensor in (out, gate, up, weight))
        library(gate.dtype).swiglu(*places, rows, inner, stride_of(gate), torch.get_num_threads())
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *parts = ctx.saved_tensors
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        inner = gate.shape[-1]
        both = gate.new_empty(*gate.shape[:-1], 2 * inner)
        to_gate, to_up = both.split(inner, dim=-1)
        to_weight = None if weight is None else weight.new_empty(weight.shape)
        grad, weight = grad.contiguous(), None if weight is None else weight.contiguous()
        places = (address(tensor) for tensor in (to_gate, to_up, to_weight, grad, gate, up, weight))
        library(gate.dtype).swiglu_back(
            *places, gate.numel() // inner, inner, stride_of(gate), 2 * inner, torch.get_num_threads()
        )
        return to_weight, *((to_gate, to_up) if len(parts) == 2 else (both,))


class FusedRMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. x: (..., n); weight: (n,) float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        out, inverse = x.new_empty(x.shape), floats(x.numel() // size)
        places = (address(tensor) for tensor in (out, inverse, x, weight))
        library(x.dtype).rms_norm(*places, len(inverse), size, stride_of(x), eps, torch.get_num_threads())
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        size, threads = x.shape[-1], torch.get_num_threads()
        to_x, to_weight, grad = x.new_empty(x.shape), floats(threads, size), grad.contiguous()
        places = (address(tensor) for tensor in (to_x, to_weight, grad, x, weight, inverse))
        library(x.dtype).rms_norm_back(*places, len(inverse), size, stride_of(x), threads)
        return to_x, to_weight.sum(0), None


def gather_sum(rows_RD: Tensor, places_NK: Tensor) -> Tensor:
    """(R, D), (N, K) int64 -> (N, D): the sum of the K rows that are named for each. Rows are contiguous."""
    out, places = rows_RD.new_empty(len(places_NK), rows_RD.shape[1]), places_NK.contiguous()
    addresses = (address(tensor) for tensor in (out, rows_RD, places))
    library(rows_RD.dtype).gather_sum(*addresses, *places.shape, rows_RD.shape[1], torch.get_num_threads())
    return out


def route(
    x_ND: Tensor,
    centroids_ED: Tensor,
    bias_E: Tensor,
    top_k: int,
    groups: tuple[int, int],
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What `model.moe.Router` gives for x, contiguous: weights (N, K) float32 and indices (N, K) int64.

    centroids, bias: float32; groups: how many there are, and how many of them may be chosen from.
    """
    count, size = x_ND.shape
    experts = len(centroids_ED)
    wide = F.pad(centroids_ED.t(), (0, -experts % LANES)).contiguous()
    weights, choices = floats(count, top_k), integers(count, top_k)
    places = (address(tensor) for tensor in (weights, choices, x_ND, wide, bias_E))
    sizes = (count, size, experts, wide.shape[1], top_k, *groups, normalise)
    library(x_ND.dtype).route(*places, *sizes, scale, torch.get_num_threads())
    return weights, choices


def causal_softmax_(scores: Tensor, first: int, scale: float) -> Tensor:
    """softmax(scale * scores) in place; query r of a block sees its first `first` + r + 1 keys, the others get 0.

    scores: (blocks, queries, keys), contiguous.
    """
    library(scores.dtype).causal_softmax(address(scores), *scores.shape, first, scale, torch.get_num_threads())
    return scores


def softmax_back_(grad: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The gradient of scores, in place of that of softmax(scale * scores) = weights. All contiguous, (..., keys)."""
    rows, keys = grad.numel() // grad.shape[-1], grad.shape[-1]
    library(grad.dtype).softmax_back(address(grad), address(weights), rows, keys, scale, torch.get_num_threads())
    return grad


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], (N,) float32; logits (N, V) become its gradient, softmax(logits) - onehot(label).

    labels: (N,) int64. Where they are negative both are 0. All contiguous. Raises `IndexError` for a label beyond V.
    """
    if len(labels) and labels.max() >= logits.shape[1]:
        raise IndexError(f"label {labels.max()} of {logits.shape[1]}")
    nll = floats(len(labels))
    places = (address(tensor) for tensor in (logits, nll, labels))
    library(logits.dtype).cross_entropy(*places, *logits.shape, torch.get_num_threads())
    return nll


def adamw_(p: Tensor, grad: Tensor, first: Tensor, second: Tensor, *numbers: float) -> None:
    """AdamW's update of p, float32, and of its moments, all contiguous and in place.

    numbers: beta1, beta2, epsilon; what p keeps, 1 - lr * weight decay; lr / (1 - beta1^t); 1 / sqrt(1 - beta2^t).
    """
    places = (address(tensor) for tensor in (p, grad, first, second))
    library(first.dtype).adamw(*places, p.numel(), *numbers, torch.get_num_threads())


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=2)
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """fused.c compiled for numbers of this type; None where that cannot be."""
    try:
        built = ctypes.CDLL(str(compiled(SOURCE, *(["-DBF16"] if dtype == torch.bfloat16 else []))))
    except (OSError, subprocess.CalledProcessError):
        return None
    place, whole, real, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    built.swiglu.argtypes = [place] * 4 + [whole] * 3 + [threads]
    built.swiglu_back.argtypes = [place] * 7 + [whole] * 4 + [threads]
    built.rms_norm.argtypes = [place] * 4 + [whole] * 3 + [real, threads]
    built.rms_norm_back.argtypes = [place] * 6 + [whole] * 3 + [threads]
    built.gather_sum.argtypes = [place] * 3 + [whole] * 3 + [threads]
    built.causal_softmax.argtypes = [place] + [whole] * 4 + [real, threads]
    built.softmax_back.argtypes = [place] * 2 + [whole] * 2 + [real, threads]
    for function in (built.swiglu, built.swiglu_back, built.rms_norm, built.rms_norm_back, built.gather_sum):
        function.restype = None
    built.cross_entropy.argtypes, built.cross_entropy.restype = [place] * 3 + [whole] * 2 + [threads], None
    built.adamw.argtypes = [place] * 4 + [whole] + [real] * 6 + [threads]
    built.adamw.restype = None
    built.route.argtypes = [place] * 5 + [whole] * 8 + [real, threads]
    built.route.restype = built.causal_softmax.restype = built.softmax_back.restype = None
    return built
