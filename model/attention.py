"""Causal softmax attention over full-size heads: which positions see which, and the kernel that computes it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from errors import one_line
from model.kernels import fused

CHUNK = 128  # query rows at a time on CPU
LARGEST_HEAD = 256  # of the flash kernels, flash-attn's and torch's
FLASH_ATTN, VARLEN, SDPA = "flash-attn", "varlen_attn", "scaled_dot_product_attention"
LONGEST_CHUNKED = 2048  # beyond, the weights that the chunks keep would take more memory than their speed is worth


@dataclass(frozen=True)
class AttentionMask:
    """Which key positions each query position may attend to.

    Attributes:
        unpadded: (batch, 1, queries, keys) bool where rows have padding on the left, else None.
        segment_ids: (batch, time) integers when samples are packed with isolation, else None.
        padding: (batch,) the positions on the left that `unpadded` hides, where that is all it does besides causality.
    """

    unpadded: Tensor | None = None
    segment_ids: Tensor | None = None
    padding: Tensor | None = None

    @staticmethod
    def within_segments(segment_ids: Tensor) -> AttentionMask:
        """Causal within a segment, nothing across. segment_ids: (batch, time)."""
        return AttentionMask(segment_ids=segment_ids)

    @property
    def plain(self) -> bool:
        """Whether each position sees all that came before."""
        return self.unpadded is None and self.segment_ids is None

    @cached_property
    def allowed(self) -> Tensor | None:
        """(batch, 1, queries, keys) bool, or None for plain causal attention: time^2 numbers, made when asked for."""
        if self.segment_ids is None:
            return self.unpadded
        ids = self.segment_ids
        return (ids[:, None, :, None] == ids[:, None, None, :]) & causal(ids.shape[1], ids.shape[1], ids.device)

    @cached_property
    def segment_ends(self) -> Tensor:
        """Where each run of one segment id starts in the flattened batch, and the end of the last: (runs + 1,) int32.

        How many there are is known to the host only after a wait for the device: once a forward pass, not once a layer.
        """
        new = torch.ones_like(self.segment_ids, dtype=torch.bool)
        new[:, 1:] = self.segment_ids[:, 1:] != self.segment_ids[:, :-1]
        starts = new.flatten().nonzero().flatten()
        return torch.cat((starts, starts.new_full((1,), new.numel()))).int()

    @staticmethod
    def left_padded(queries: int, keys: int, padding: Tensor) -> AttentionMask:
        """The last `queries` of `keys` positions see what came before; padding: (batch,) left-padding of each row."""
        device = padding.device
        is_token = torch.arange(keys, device=device)[None, None, None, :] >= padding[:, None, None, None]
        # A padding position sees itself, or its softmax over nothing would be NaN.
        itself = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(keys - queries)
        allowed = causal(queries, keys, device)
        return AttentionMask((allowed & is_token) | (allowed & itself), padding=padding)

    @staticmethod
    def up_to(positions_BT: Tensor, keys: int) -> AttentionMask:
        """Rows of different lengths that begin at key 0: each position sees the keys up to itself."""
        return AttentionMask(torch.arange(keys, device=positions_BT.device) <= positions_BT[:, None, :, None])

    def at(self, last_positions_B: Tensor, queries: int, keys: int) -> AttentionMask:
        """For one of the last `queries` of `keys` positions of each row, counted from the first of these."""
        if self.allowed is None:
            return AttentionMask.up_to((last_positions_B + keys - queries).unsqueeze(1), keys)
        return AttentionMask(select_positions(self.allowed.transpose(1, 2), last_positions_B).transpose(1, 2))

    def as_bool(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Bool, broadcastable to (batch, heads, queries, keys), for the last `queries` positions; None: all visible."""
        if queries == 1 or not self.plain:
            return self.allowed
        return causal(queries, keys, device)


def select_positions(x_BT: Tensor, last_positions_B: Tensor) -> Tensor:
    """(batch or 1, time, ...) -> (batch, 1, ...): the wanted position of each row."""
    rows = torch.arange(len(last_positions_B), device=x_BT.device) if x_BT.shape[0] > 1 else 0
    return x_BT[rows, last_positions_B].unsqueeze(1)


def causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: the last `queries` of `keys` positions, each seeing itself and what came before."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, attention_mask: AttentionMask) -> Tensor:
    """softmax(q k^T * scale) v.

    Args:
        q, k: (batch, time, heads, qk); v: (batch, time, heads, value).
    Returns:
        (batch, time, heads, value)
    """
    value_size = v.shape[-1]
    if q.device.type == "cpu" and q.shape[1] <= LONGEST_CHUNKED:
        # Causality alone needs no mask where the softmax knows of it.
        causal_only = attention_mask.allowed is None and fused.available(q)
        mask = None if causal_only else attention_mask.as_bool(q.shape[1], k.shape[1], q.device)
        mask = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        # Autocast would carry each softmax through memory in float32; the kernel computes in float32 anyway.
        with torch.autocast("cpu", enabled=False):
            return _ChunkedAttention.apply(q, k, v, mask, causal_only, scale)
    # The fused kernels want one head size for q, k and v: zeros added to v change nothing and are cut off again.
    if value_size < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - value_size))
    plain = attention_mask.plain and q.shape[1] == k.shape[1]
    kernel = cuda_kernel(q, value_size, plain, attention_mask.segment_ids is not None)
    flash = flash_attention() if kernel == FLASH_ATTN else None
    if flash is not None and plain:
        return flash.flash_attn_func(q, k, v, softmax_scale=scale, causal=True)[..., :value_size]
    if kernel != SDPA:
        return _attend_segments(flash, q, k, v, scale, attention_mask.segment_ends)[..., :value_size]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if plain else attention_mask.as_bool(q.shape[1], k.shape[1], q.device),
        is_causal=plain,
        scale=scale,
    )
    return out.transpose(1, 2)[..., :value_size]


def cuda_kernel(q: Tensor, value_size: int, plain: bool, isolated: bool) -> str:
    """The kernel of `attend` for q (batch, time, heads, qk) that sees all before it or its own segment; else SDPA."""
    fits = q.is_cuda and q.dtype == torch.bfloat16 and value_size <= q.shape[-1] <= LARGEST_HEAD
    if not fits or not (plain or isolated):
        return SDPA
    if has_flash_attention():
        return FLASH_ATTN
    return VARLEN if isolated and q.shape[-1] % 8 == 0 else SDPA


class _ChunkedAttention(torch.autograd.Function):
    """Attention on CPU: rows of queries at a time, each against only the keys that causality leaves it.

    The plain products of a chunk run three times as fast, forward and backward, as the fused CPU kernel
    (docs/lab-log.md), for the price of keeping the weights, time^2 / 2 numbers a head.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal_only: bool, scale: float) -> Tensor:
        batch, queries, heads, _ = q.shape
        past = k.shape[1] - queries
        q, k, v = (rearrange(x, "b t h d -> (b h) t d") for x in (q, k, v))
        out, weights = v.new_empty(batch * heads, queries, v.shape[-1]), []
        for rows, end in _chunks(queries, past):
            scores = torch.bmm(q[:, rows], k[:, :end].transpose(1, 2))
            if causal_only:
                weights.append(fused.causal_softmax_(scores, past + rows.start, scale))
            else:
                scores.mul_(scale)
                if mask is not None:
                    scores.view(batch, heads, -1, end).add_(mask[..., rows, :end])
                weights.append(scores.softmax(-1))
            out[:, rows] = torch.bmm(weights[-1], v[:, :end])
        ctx.save_for_backward(q, k, v, *weights)
        ctx.causal_only, ctx.scale, ctx.heads = causal_only, scale, heads
        return rearrange(out, "(b h) t d -> b t h d", h=heads)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        queries = grad.shape[1]
        grad = rearrange(grad, "b t h d -> (b h) t d")
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (rows, end), weight in zip(_chunks(queries, k.shape[1] - queries), weights, strict=True):
            grad_v[:, :end] += torch.bmm(weight.transpose(1, 2), grad[:, rows])
            grad_weight = torch.bmm(grad[:, rows], v[:, :end].transpose(1, 2))
            if ctx.causal_only:
                grad_scores = fused.softmax_back_(grad_weight, weight, ctx.scale)
            else:
                grad_scores = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
                grad_scores.mul_(ctx.scale)
            grad_q[:, rows] = torch.bmm(grad_scores, k[:, :end])
            grad_k[:, :end] += torch.bmm(grad_scores.transpose(1, 2), q[:, rows])
        gradients = (rearrange(x, "(b h) t d -> b t h d", h=ctx.heads) for x in (grad_q, grad_k, grad_v))
        return *gradients, None, None, None


def _chunks(queries: int, past: int) -> list[tuple[slice, int]]:
    """Chunks of query rows, each with the number of keys that causality lets it see."""
    starts = range(0, queries, CHUNK)
    return [(slice(start, min(start + CHUNK, queries)), past + min(start + CHUNK, queries)) for start in starts]


def _attend_segments(flash, q: Tensor, k: Tensor, v: Tensor, scale: float, ends: Tensor) -> Tensor:
    """Isolated packing by kernels for sequences of varying length: flash-attn's, or the ones that torch has on CUDA."""
    time, (q_flat, k_flat, v_flat) = q.shape[1], (x.flatten(0, 1) for x in (q, k, v))
    if flash is None:
        from torch.nn.attention.varlen import varlen_attn  # brings torch._dynamo: seconds, and only CUDA comes here

        out = varlen_attn(q_flat, k_flat, v_flat, ends, ends, time, time, scale=scale, window_size=(-1, 0))
    else:
        out = flash.flash_attn_varlen_func(
            q_flat, k_flat, v_flat, ends, ends, time, time, softmax_scale=scale, causal=True
        )
    return out.view_as(q)


def has_flash_attention() -> bool:
    """Whether `flash_attention` is there; torch.compile asks once, where an import that fails would break its graph."""
    return flash_attention() is not None


# torch.compiler.assume_constant_result sets this after importing torch._dynamo, which takes as long as torch itself.
has_flash_attention._dynamo_marked_constant = True


@lru_cache(maxsize=1)
def flash_attention() -> ModuleType | None:
    """The flash-attn package (requirements-cuda.txt); None where it is not installed, or broken, which is reported."""
    try:
        import flash_attn
    except (
        Exception
    ) as error:  # ImportError or OSError where it was compiled for another torch, or what its imports raise
        if getattr(error, "name", None) != "flash_attn":
            print(
                f"notice: flash-attn is installed but not used, as it cannot be imported ({one_line(str(error))}); "
                f"{SDPA} takes its place: compile flash-attn again for torch {torch.__version__}, or uninstall it",
                file=sys.stderr,
            )
        return None
    return flash_attn
