"""Attention over full-size heads: chunks of queries on a CPU, flash-attn's kernels or torch's on CUDA."""

from __future__ import annotations

import sys
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend

import model.kernels as kernels
from errors import one_line
from model.kernels.fused import causal_softmax_, softmax_back_

CHUNK = 128  # query rows at a time on a CPU
LONGEST_CHUNKED = 2048  # beyond, the weights that the chunks keep would take more memory than their speed is worth
FEWEST_SEGMENTS = 64
LARGEST_HEAD = 256  # of the flash kernels, flash-attn's and torch's
FLASH_ATTN, VARLEN, SDPA = "flash-attn", "varlen_attn", "scaled_dot_product_attention"


class ChunkedAttention(torch.autograd.Function):
    """softmax(q k^T * scale) v on a CPU: rows of queries at a time, each against the keys that causality leaves it.

    Three times as fast, forward and backward, as torch's fused CPU kernel (docs/lab-log.md), but the weights are kept,
    time^2 / 2 numbers a head.

    q, k, v: (batch, time, heads, size); mask: added to the scores, or None; causal_only: the softmax hides the keys.
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
                weights.append(causal_softmax_(scores, past + rows.start, scale))
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
                grad_scores = softmax_back_(grad_weight, weight, ctx.scale)
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


def segments(q: Tensor, k: Tensor, v: Tensor, scale: float, ends: Tensor) -> Tensor:
    """Isolated packing by flash-attn's kernels or torch's own; ends: see `segment_ends`."""
    time, (q_flat, k_flat, v_flat) = q.shape[1], (x.flatten(0, 1) for x in (q, k, v))
    if not has_flash_attention():
        from torch.nn.attention.varlen import varlen_attn  # brings torch._dynamo: seconds, and only CUDA comes here

        out = varlen_attn(q_flat, k_flat, v_flat, ends, ends, time, time, scale=scale, window_size=(-1, 0))
    else:
        given = (q_flat, k_flat, v_flat, ends, ends, time, time)
        out = flash_attention().flash_attn_varlen_func(*given, softmax_scale=scale, causal=True)
    return out.view_as(q)


def segment_ends(segment_ids: Tensor) -> Tensor:
    """Where each run of one segment id starts in the flattened batch, then the end of the last, (runs + 1,) int32.

    Empty segments follow up to a power of two, so that compiled graphs and allocations meet few sizes. On a device the
    host waits for how many there are: made of a batch before it goes there, they cost no wait.
    """
    new = torch.ones_like(segment_ids, dtype=torch.bool)
    new[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = new.flatten().nonzero().flatten()
    size = max(FEWEST_SEGMENTS, 1 << (len(starts) - 1).bit_length())
    return F.pad(starts, (0, size + 1 - len(starts)), value=new.numel()).int()


def has_flash_attention() -> bool:
    """Return whether flash-attn is there; torch.compile asks once, where a failing import would break its graph."""
    return flash_attention() is not None


# torch.compiler.assume_constant_result sets this after importing torch._dynamo, which takes as long as torch itself.
has_flash_attention._dynamo_marked_constant = True


@lru_cache(maxsize=1)
def flash_attention() -> ModuleType | None:
    """The flash-attn package (requirements-cuda.txt); None where it is not installed, or broken, which is reported."""
    try:
        import flash_attn
    except Exception as error:  # ImportError or OSError where it was compiled for another torch, or any other
        if getattr(error, "name", None) != "flash_attn":
            print(
                f"notice: flash-attn is installed but not used, as it cannot be imported ({one_line(str(error))}); "
                f"{SDPA} takes its place: compile flash-attn again for torch {torch.__version__}, or uninstall it",
                file=sys.stderr,
            )
        return None
    return flash_attn


def takes_segments(x: Tensor, size: int, value_size: int) -> bool:
    """Return whether packed rows like x go to a kernel by their segments' ends; size: of a head of q and k."""
    return cuda_kernel(x, size, value_size, isolated=True) != SDPA


def cuda_kernel(x: Tensor, size: int, value_size: int, isolated: bool = False) -> str:
    """The kernel of `attend` on CUDA for heads in the type of x that see all before, or their own segment."""
    if not kernels.on_cuda(x) or x.dtype != torch.bfloat16 or not value_size <= size <= LARGEST_HEAD:
        return SDPA
    if has_flash_attention():
        return FLASH_ATTN
    return VARLEN if isolated and size % 8 == 0 else SDPA


def report(q_BTHQ: Tensor, value_size: int, isolated: bool) -> str:
    """Name the kernel of `attend` in training on CUDA; of `scaled_dot_product_attention` torch's own choice as well."""
    kernel = cuda_kernel(q_BTHQ, q_BTHQ.shape[-1], value_size, isolated)
    if kernel != SDPA:
        return kernel if kernel == VARLEN else f"{FLASH_ATTN} {flash_attention().__version__}"
    # v comes padded to the size of q and k, and isolated segments as a mask.
    q = q_BTHQ.transpose(1, 2).requires_grad_()
    v = q if value_size <= q.shape[-1] else q.new_empty(*q.shape[:-1], value_size)
    mask = torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool, device=q.device) if isolated else None
    choice = torch._fused_sdp_choice(q, q, v, attn_mask=mask, is_causal=mask is None)
    return f"{SDPA} ({SDPBackend(choice).name.lower().removesuffix('_attention')})"
