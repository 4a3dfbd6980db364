"""MLA's causal attention over whole heads on a CPU: `causal.c` for training, `fused_attention.c` for prefill.

Queries, keys and values are read where their projections wrote them; the backward pass computes the scores again.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from model.kernels import compiled
from model.kernels.compiled import INTEGER, REAL, fields, floats, multiplies, opener, readable, scratch
from model.kernels.fused import LANES, stride_of

PREFILL_KEYS, PREFILL_PAIRS = 16, 32  # fused_attention.c pads keys and values to these


class Sizes(ctypes.Structure):
    """The struct of the same name in causal.c."""

    _fields_ = fields(
        (INTEGER, "batch queries keys heads nope rope value k_rope_stride k_rope_batch angles_batch"), (REAL, "scale")
    )


library = opener("causal.c", attend="tttttttpi", attend_back="ttttttttttpi", scratch="pi>")


@lru_cache(maxsize=1)
def prefill_library() -> ctypes.CDLL | None:
    """Open fused_attention.c; None where that cannot be, or the processor has no dot products of bfloat16."""
    return compiled.library("fused_attention.c", torch.float32, attend="tttttttlllllllllfi")


def fits(q: Tensor, kv: Tensor, k_rope: Tensor) -> bool:
    """Return whether `CausalAttention` takes these, and is the fastest way."""
    if not readable(q, kv, k_rope) or not q.dtype == kv.dtype == k_rope.dtype or not q.numel():
        return False
    rope = k_rope.shape[-1]
    sizes = (rope, q.shape[-1] - rope, kv.shape[-1] - q.shape[-1] + rope)
    return not any(size % LANES for size in sizes) and multiplies(q.dtype) and library(q.dtype) is not None


class CausalAttention(torch.autograd.Function):
    """softmax(q k^T * scale) v, the last queries of all keys, each seeing itself and what came before.

    q: (B, T, H, nope + rope), not yet rotated; kv: (B, S, H, nope + value) = [k_nope | v] of each head;
    k_rope: (B, S, rope), rotated; rope: (B or 1, T, 1, rope / 2, 2) float32, from `RotaryEmbedding`.
    Returns (B, T, H, value).
    """

    @staticmethod
    def forward(ctx, q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float) -> Tensor:
        q, kv, angles = q.contiguous(), kv.contiguous(), rope.contiguous()
        k_rope = k_rope if stride_of(k_rope) is not None else k_rope.contiguous()
        (batch, queries, heads, qk), keys, part = q.shape, kv.shape[1], k_rope.shape[-1]
        value = kv.shape[-1] - qk + part
        sizes = Sizes(
            *(batch, queries, keys, heads, qk - part, part, value),
            *(k_rope.stride(1), k_rope.stride(0), angles[0].numel() if len(angles) > 1 else 0, scale),
        )
        out, log_sum = q.new_empty(batch, queries, heads, value), floats(batch, heads, queries)
        _call("attend", q.dtype, sizes, out, log_sum, q, kv, k_rope, angles)
        ctx.save_for_backward(q, kv, k_rope, angles, log_sum)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, k_rope, angles, log_sum = ctx.saved_tensors
        to_q, to_kv = torch.empty_like(q), torch.empty_like(kv)
        to_k_rope = kv.new_empty(*kv.shape[:3], k_rope.shape[-1])
        gradients, inputs = (to_q, to_kv, to_k_rope), (grad.contiguous(), log_sum, q, kv, k_rope, angles)
        _call("attend_back", q.dtype, ctx.sizes, *gradients, *inputs)
        return to_q, to_kv, to_k_rope.sum(2), None, None


def _call(name: str, dtype: torch.dtype, sizes: Sizes, *tensors: Tensor) -> None:
    """Call a function of causal.c with the scratch memory that it needs."""
    built, threads = library(dtype), torch.get_num_threads()
    memory = scratch(threads * built.scratch(ctypes.byref(sizes), name == "attend_back"))
    getattr(built, name)(*tensors, memory, ctypes.byref(sizes), threads)


def prefill_fits(q: Tensor) -> bool:
    """Return whether `prefill` computes with these queries: bfloat16, no gradient."""
    return q.dtype == torch.bfloat16 and not torch.is_grad_enabled() and readable(q) and prefill_library() is not None


def prefill(
    q_BTHQ: Tensor, kv_BSHE: Tensor, k_rope_BSR: Tensor, rope: Tensor, scale: float, padding: Tensor | None
) -> Tensor:
    """As `CausalAttention`, all bfloat16; padding: (B,) int64 positions hidden on the left of each row, or None."""
    batch, time, heads, query = q_BTHQ.shape
    held, rope_size = k_rope_BSR.shape[1:]
    nope = query - rope_size
    value = kv_BSHE.shape[-1] - nope
    angles = rope.contiguous()
    q, kv, k_rope = q_BTHQ.contiguous(), kv_BSHE.contiguous(), k_rope_BSR
    if k_rope.stride(2) != 1 or k_rope.stride(0) != held * k_rope.stride(1):
        k_rope = k_rope.contiguous()
    padding = None if padding is None else padding.contiguous()
    threads, out = torch.get_num_threads(), q.new_empty(batch, time, heads, value)
    key_size, value_size = -(-query // PREFILL_PAIRS) * PREFILL_PAIRS, -(-value // PREFILL_KEYS) * PREFILL_KEYS
    memory = q.new_empty(threads * -(-held // PREFILL_KEYS) * PREFILL_KEYS * (key_size + value_size))
    angle_rows = angles[0].numel() if len(angles) > 1 else 0
    sizes = (batch, time, held, heads, nope, rope_size, value, k_rope.stride(1), angle_rows)
    prefill_library().attend(out, q, kv, k_rope, angles, padding, memory, *sizes, scale, threads)
    return out
