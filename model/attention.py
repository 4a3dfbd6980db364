"""Causal softmax attention over full-size heads: which positions see which, and the kernel that computes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Which key positions each query position may attend to.

    Attributes:
        allowed: (batch or 1, 1, queries, keys) bool, or None for plain causal attention over equal lengths.
        segment_ids: (batch, time) integers when samples are packed with isolation, else None.
    """

    allowed: Tensor | None = None
    segment_ids: Tensor | None = None

    @staticmethod
    def packed(segment_ids: Tensor) -> Visibility:
        """Causal within a segment, nothing across. segment_ids: (batch, time)."""
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        return Visibility(same & causal(segment_ids.shape[1], segment_ids.shape[1], segment_ids.device), segment_ids)

    @staticmethod
    def padded(queries: int, keys: int, padding: Tensor) -> Visibility:
        """The last `queries` of `keys` positions see what came before; padding: (batch,) left-padding of each row."""
        device = padding.device
        real = torch.arange(keys, device=device)[None, None, None, :] >= padding[:, None, None, None]
        # A padding position sees itself, or its softmax over nothing would be NaN.
        itself = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries)
        allowed = causal(queries, keys, device)
        return Visibility((allowed & real) | (allowed & itself))

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Bool mask broadcastable to (batch, heads, queries, keys) for the last `queries` positions; None: all visible."""
        if self.allowed is not None or queries == 1:
            return self.allowed
        return causal(queries, keys, device)


def causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: the last `queries` of `keys` positions, each seeing itself and what came before."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, visibility: Visibility) -> Tensor:
    """softmax(q k^T * scale) v.

    Args:
        q, k: (batch, time, heads, qk); v: (batch, time, heads, value).
    Returns:
        (batch, time, heads, value)
    """
    value_size = v.shape[-1]
    # The fused kernels want one head size for q, k and v: zeros added to v change nothing and are cut off again.
    if value_size < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - value_size))
    plain = visibility.allowed is None and q.shape[1] == k.shape[1]
    flash = flash_attention() if q.is_cuda and q.dtype == torch.bfloat16 and value_size <= q.shape[-1] else None
    if flash is not None and plain:
        return flash.flash_attn_func(q, k, v, softmax_scale=scale, causal=True)[..., :value_size]
    if flash is not None and visibility.segment_ids is not None:
        return _attend_segments(flash, q, k, v, scale, visibility.segment_ids)[..., :value_size]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if plain else visibility.mask(q.shape[1], k.shape[1], q.device),
        is_causal=plain,
        scale=scale,
    )
    return out.transpose(1, 2)[..., :value_size]


def _attend_segments(flash, q: Tensor, k: Tensor, v: Tensor, scale: float, segment_ids: Tensor) -> Tensor:
    """Isolated packing with flash-attn's variable-length kernel: each run of one segment id is a sequence of its own."""
    batch, time = segment_ids.shape
    new = torch.ones_like(segment_ids, dtype=torch.bool)
    new[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = new.flatten().nonzero().flatten()
    ends = torch.cat((starts, starts.new_tensor([batch * time]))).int()
    out = flash.flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends, ends, time, time, softmax_scale=scale, causal=True
    )
    return out.unflatten(0, (batch, time))


@lru_cache(maxsize=1)
def flash_attention():
    """The flash-attn package (requirements-cuda.txt), or None where it is not installed."""
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn
