"""MLA's causal attention on CPU over whole heads, forward and backward: `causal.c`, compiled here.

Weights are computed again in the backward pass, so they take no memory; queries, keys and values are read where their
projections wrote them, and gradients written where they are wanted. Everywhere else `model.attention` does it.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from model.kernels.compiled import floats, multiplies, opened
from model.kernels.fused import LANES, TYPES, address, stride_of

SOURCE = Path(__file__).with_name("causal.c")


class Sizes(ctypes.Structure):
    """The struct of the same name in causal.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "queries", "keys", "heads", "nope", "rope", "value")),
        *((name, ctypes.c_int64) for name in ("k_rope_stride", "k_rope_batch", "angles_batch")),
        ("scale", ctypes.c_float),
    ]


def fits(q: Tensor, kv: Tensor, k_rope: Tensor) -> bool:
    """Whether `CausalAttention` takes these, and is the quicker way."""
    if q.device.type != "cpu" or q.dtype not in TYPES or torch.compiler.is_compiling() or not q.numel():
        return False
    same = all(type(x) is Tensor and x.dtype == q.dtype for x in (q, kv, k_rope))
    rope = k_rope.shape[-1]
    sizes = (rope, q.shape[-1] - rope, kv.shape[-1] - q.shape[-1] + rope)
    return same and not any(size % LANES for size in sizes) and multiplies(q.dtype) and library(q.dtype) is not None


class CausalAttention(torch.autograd.Function):
    """softmax(q k^T * scale) v, the last queries of all keys, each seeing itself and what came before.

    q: (B, T, H, nope + rope), not yet rotated; kv: (B, S, H, nope + value) = [k_nope | v] of each head;
    k_rope: (B, S, rope), rotated; rope: (B or 1, T, 1, rope / 2) complex64, from `RotaryEmbedding`.
    Returns (B, T, H, value).
    """

    @staticmethod
    def forward(ctx, q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float) -> Tensor:
        q, kv, angles = q.contiguous(), kv.contiguous(), torch.view_as_real(rope.resolve_conj()).contiguous()
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
        _call(
            "attend_back", q.dtype, ctx.sizes, to_q, to_kv, to_k_rope, grad.contiguous(), log_sum, q, kv, k_rope, angles
        )
        return to_q, to_kv, to_k_rope.sum(2), None, None


def _call(name: str, dtype: torch.dtype, sizes: Sizes, *tensors: Tensor) -> None:
    """A function of causal.c, with the scratch memory that it wants."""
    built, threads = library(dtype), torch.get_num_threads()
    memory = floats(threads * built.scratch(ctypes.byref(sizes), name == "attend_back") + LANES)
    ahead = -memory.data_ptr() % 64  # rows begin with a line of the cache
    getattr(built, name)(*map(address, tensors), memory.data_ptr() + ahead, ctypes.byref(sizes), threads)


@lru_cache(maxsize=2)
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """causal.c compiled for numbers of this type; None where that cannot be."""
    built = opened(SOURCE, dtype)
    if built is None:
        return None
    place, sizes, whole = ctypes.c_void_p, ctypes.POINTER(Sizes), ctypes.c_int
    built.attend.argtypes = [place] * 7 + [sizes, whole]
    built.attend_back.argtypes = [place] * 10 + [sizes, whole]
    built.attend.restype = built.attend_back.restype = None
    built.scratch.argtypes, built.scratch.restype = [sizes, whole], ctypes.c_int64
    return built
