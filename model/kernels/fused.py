"""SwiGLU, RMSNorm, softmax, cross entropy, sums of rows, routing and AdamW in one pass each on a CPU: `fused.c`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.compiled import floats, integers, opener, readable

LANES = 16  # rows are whole numbers of so many

library = opener(
    "fused.c",
    swiglu="ttttllli", swiglu_back="tttttttlllli", rms_norm="ttttlllfi", rms_norm_back="ttttttllli",
    gather_sum="tttllli", causal_softmax="tllllfi", softmax_back="ttllfi", cross_entropy="tttlli",
    adamw="ttttlffffffi", route="tttttllllllllfi",
)  # fmt: skip


def available(x: Tensor) -> bool:
    """Return whether `fused.c` computes on this device and in this type."""
    return readable(x) and library(x.dtype) is not None


def fits(x: Tensor, *others: Tensor) -> bool:
    """Return whether it computes with x (..., n) and others like it: rows of whole lanes, evenly apart."""
    if not available(x) or x.shape[-1] % LANES or not x.numel() or stride_of(x) is None:
        return False
    return all(readable(y) and y.dtype == x.dtype and stride_of(y) == stride_of(x) for y in others)


def stride_of(x: Tensor) -> int | None:
    """Return how far apart the rows (last axis) of x are, if one number says it for all of them."""
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


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up * weight (...) or None, keeping only its inputs; parts: [gate | up] (..., 2 n), or both apart."""

    @staticmethod
    def forward(ctx, weight: Tensor | None, *parts: Tensor) -> Tensor:
        weight = None if weight is None else weight.contiguous()
        ctx.save_for_backward(weight, *parts)
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        out = gate.new_empty(gate.shape)
        rows, inner = gate.numel() // gate.shape[-1], gate.shape[-1]
        library(gate.dtype).swiglu(out, gate, up, weight, rows, inner, stride_of(gate), torch.get_num_threads())
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *parts = ctx.saved_tensors
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
        rows, inner = gate.numel() // gate.shape[-1], gate.shape[-1]
        both = gate.new_empty(*gate.shape[:-1], 2 * inner)
        to_gate, to_up = both.split(inner, dim=-1)
        to_weight = None if weight is None else torch.empty_like(weight)
        tensors = (to_gate, to_up, to_weight, grad.contiguous(), gate, up, weight)
        strides = (stride_of(gate), 2 * inner)
        library(gate.dtype).swiglu_back(*tensors, rows, inner, *strides, torch.get_num_threads())
        return to_weight, *((to_gate, to_up) if len(parts) == 2 else (both,))


class WeightedSwiGLU(torch.autograd.Function):
    """The same in PyTorch, for gate_up (R, 2 * I) = [gate | up] and weight (R,): autograd would keep every product."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        gate, up = gate_up.chunk(2, dim=-1)
        # Not in place: torch 2.11's compiler drops the gradient of a result that was written in place.
        return F.silu(gate).mul_(up) * weight.unsqueeze(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weight = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        scaled = grad * weight.unsqueeze(1)
        grad_up = scaled * activated
        grad_weight = activated.mul_(up).mul_(grad).sum(-1)
        return torch.cat((torch.ops.aten.silu_backward(scaled.mul_(up), gate), grad_up), dim=-1), grad_weight


def weighted_swiglu(gate_up_R2I: Tensor, weight_R: Tensor) -> Tensor:
    """silu(gate) * up * weight for [gate | up] = gate_up, keeping nothing else for the backward pass."""
    if fits(*gate_up_R2I.chunk(2, dim=-1)):
        return SwiGLU.apply(weight_R, gate_up_R2I)
    return WeightedSwiGLU.apply(gate_up_R2I, weight_R)


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. x: (..., n); weight: (n,) float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        out, inverse = x.new_empty(x.shape), floats(x.numel() // size)
        sizes = (len(inverse), size, stride_of(x))
        library(x.dtype).rms_norm(out, inverse, x, weight, *sizes, eps, torch.get_num_threads())
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        size, threads = x.shape[-1], torch.get_num_threads()
        to_x, to_weight = x.new_empty(x.shape), floats(threads, size)
        tensors = (to_x, to_weight, grad.contiguous(), x, weight, inverse)
        library(x.dtype).rms_norm_back(*tensors, len(inverse), size, stride_of(x), threads)
        return to_x, to_weight.sum(0), None


def gather_sum(rows_RD: Tensor, places_NK: Tensor) -> Tensor:
    """(R, D), (N, K) int64 -> (N, D): the sum of the K rows that are named for each. Rows are contiguous."""
    out, places = rows_RD.new_empty(len(places_NK), rows_RD.shape[1]), places_NK.contiguous()
    library(rows_RD.dtype).gather_sum(out, rows_RD, places, *places.shape, rows_RD.shape[1], torch.get_num_threads())
    return out


def route(
    x_ND: Tensor, centroids_ED: Tensor, bias_E: Tensor, top_k: int, groups: tuple[int, int], normed: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Choose experts for x, contiguous: weights (N, K) float32 and indices (N, K) int64, Eq. 13 to 16.

    centroids, bias: float32; groups: how many there are, and how many may be chosen from.
    """
    wide = F.pad(centroids_ED.t(), (0, -len(centroids_ED) % LANES)).contiguous()
    weights, choices = floats(len(x_ND), top_k), integers(len(x_ND), top_k)
    sizes = (*x_ND.shape, len(centroids_ED), wide.shape[1], top_k, *groups, normed)
    library(x_ND.dtype).route(weights, choices, x_ND, wide, bias_E, *sizes, scale, torch.get_num_threads())
    return weights, choices


def causal_softmax_(scores: Tensor, first: int, scale: float) -> Tensor:
    """softmax(scale * scores) in place; query r of a block sees its first `first` + r + 1 keys, the others get 0.

    scores: (blocks, queries, keys), contiguous.
    """
    library(scores.dtype).causal_softmax(scores, *scores.shape, first, scale, torch.get_num_threads())
    return scores


def softmax_back_(grad: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The gradient of scores, in place of that of softmax(scale * scores) = weights. All contiguous, (..., keys)."""
    rows, keys = grad.numel() // grad.shape[-1], grad.shape[-1]
    library(grad.dtype).softmax_back(grad, weights, rows, keys, scale, torch.get_num_threads())
    return grad


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label], (N,) float32; logits (N, V) become its gradient, softmax(logits) - onehot(label).

    labels: (N,) int64. Where they are negative both are 0. All contiguous. Raises `IndexError` for a label beyond V.
    """
    if len(labels) and labels.max() >= logits.shape[1]:
        raise IndexError(f"label {labels.max()} of {logits.shape[1]}")
    nll = floats(len(labels))
    library(logits.dtype).cross_entropy(logits, nll, labels, *logits.shape, torch.get_num_threads())
    return nll


def adamw_(p: Tensor, grad: Tensor, first: Tensor, second: Tensor, *numbers: float) -> None:
    """AdamW's update of p, float32, and of its moments, all contiguous and in place.

    numbers: beta1, beta2, epsilon; what p keeps, 1 - lr * weight decay; lr / (1 - beta1^t); 1 / sqrt(1 - beta2^t).
    """
    library(first.dtype).adamw(p, grad, first, second, p.numel(), *numbers, torch.get_num_threads())
