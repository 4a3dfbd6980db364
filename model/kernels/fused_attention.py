"""Attention of prefill on CPU in one pass: `fused_attention.c`, compiled where the processor multiplies bfloat16."""

from __future__ import annotations

import ctypes
import subprocess
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from model.attention import AttentionMask
from model.kernels.compiled import compiled
from model.kernels.fused import address

SOURCE = Path(__file__).with_name("fused_attention.c")
SIZES = "rows time held heads nope rope value apart angle_rows"
KEYS, PAIRS = 16, 32  # keys and values are packed in groups of so many, and each key to so many numbers


def fits(q: Tensor, attention_mask: AttentionMask) -> bool:
    """Whether it computes with these queries: bfloat16, no gradient, and nothing hidden but the future and padding."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return (attention_mask.plain or attention_mask.padding is not None) and type(q) is Tensor and library() is not None


def attend(
    q_BTHQ: Tensor, kv_BSHE: Tensor, k_rope_BSR: Tensor, rope: Tensor, scale: float, padding: Tensor | None
) -> Tensor:
    """softmax(q k^T * scale) v of the last T of S positions, causal.

    Args:
        q_BTHQ: [q_nope | q_rope], not rotated yet. kv_BSHE: [k_nope | v]. k_rope_BSR: the key that all heads share,
            rotated. All bfloat16. rope: from `RotaryEmbedding`, of the T positions.
        padding: (B,) int64 positions on the left that nobody but themselves sees, or None.
    Returns:
        (B, T, H, value)
    """
    batch, time, heads, query = q_BTHQ.shape
    held, rope_size = k_rope_BSR.shape[1:]
    nope = query - rope_size
    value = kv_BSHE.shape[-1] - nope
    angles = torch.view_as_real(rope).contiguous()
    q, kv, k_rope = q_BTHQ.contiguous(), kv_BSHE.contiguous(), k_rope_BSR
    if k_rope.stride(2) != 1 or k_rope.stride(0) != held * k_rope.stride(1):
        k_rope = k_rope.contiguous()
    padding = None if padding is None else padding.contiguous()
    threads = torch.get_num_threads()
    out = q.new_empty(batch, time, heads, value)
    room = q.new_empty(threads * _up(held, KEYS) * (_up(query, PAIRS) + _up(value, KEYS)))
    places = (address(tensor) for tensor in (out, q, kv, k_rope, angles, padding, room))
    angle_rows = angles[0].numel() if len(angles) > 1 else 0
    sizes = (batch, time, held, heads, nope, rope_size, value, k_rope.stride(1), angle_rows)
    library().attend(*places, *sizes, scale, threads)
    return out


def _up(size: int, of: int) -> int:
    return -(-size // of) * of


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """fused_attention.c compiled; None where that cannot be, or the processor has no dot products of bfloat16."""
    try:
        built = ctypes.CDLL(str(compiled(SOURCE)))
    except (OSError, subprocess.CalledProcessError):
        return None
    if not hasattr(built, "attend"):
        return None
    built.attend.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * len(SIZES.split())
    built.attend.argtypes += [ctypes.c_float, ctypes.c_int]
    built.attend.restype = None
    return built
