"""The one door to the kernels: each operation in PyTorch, and by a kernel (model/kernels/) where that is faster.

Which applies is asked of tensors: their device, type and layout, and whether gradients are recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model.kernels as kernels
from LMConfig import LMConfig
from model.attention import AttentionMask
from model.rope import rotate as rotate_pairs

if TYPE_CHECKING:
    from model.experts import Experts, Plan
    from model.kernels.grouped import GradBuffer
    from model.moe import Router
    from model.pipeline import WeightGradients
    from model.quantized import QuantizedWeight

# CPU kernels are generated for each new row count (7 to 10 ms in bfloat16 against under 1 ms of work): each expert's
# rows are padded to a multiple of the largest of these blocks of which its share fills four.
ROW_BLOCKS = (128, 64, 32, 16)
SMALL_ROW_BLOCK = 8  # under that, and on CUDA, whose grouped products want groups aligned to 16 bytes
FEW_TOKENS = 512  # up to so many on CUDA, without gradients, the host waits for no expert's rows
FEW_CHOICES = 16  # up to so many (token, expert) pairs are computed one by one


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32; in the type of x."""
    if type(weight) is not nn.Parameter or not kernels.fused.fits(x):
        if x.dtype == weight.dtype:
            return F.rms_norm(x, weight.shape, weight, eps)  # goes through float32 by itself
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return kernels.fused.RMSNorm.apply(x, weight.float(), eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    if not kernels.fused.fits(gate, up):
        return F.silu(gate) * up
    return kernels.fused.SwiGLU.apply(None, gate, up)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., in) -> (..., out)."""
    if not kernels.products.fits(x, weight, bias):
        return F.linear(x, weight, bias)
    out = kernels.products.LinearProduct.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def weighted_swiglu(gate_up_R2I: Tensor, weight_R: Tensor) -> Tensor:
    """silu(gate) * up * weight for [gate | up] = gate_up, keeping nothing else for the backward pass."""
    return kernels.fused.weighted_swiglu(gate_up_R2I, weight_R)


class Linear(nn.Linear):
    """`nn.Linear` computed by `linear`. Attributes: later: where the gradient of its weight waits, if it does."""

    later: WeightGradients | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        if self.later is not None and self.weight.requires_grad:
            return self.later.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)


def head_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden (..., hidden) after a norm, head (vocab, hidden) -> (..., vocab) float32."""
    if not kernels.decode.projects(hidden, head):
        return F.linear(hidden, head.to(hidden.dtype)).float()
    return kernels.decode.project(hidden, head, head.dtype)


def packed_mask(segment_ids: Tensor | None, segment_ends: Tensor | None, x: Tensor, config: LMConfig) -> AttentionMask:
    """The mask of (batch, time) segment ids, if any, made once for all layers; x: in the type that they compute in."""
    if segment_ids is None:
        return AttentionMask()
    if not kernels.attention.takes_segments(x, config.qk_head_dim, config.v_head_dim):
        return AttentionMask.isolated(segment_ids)
    ends = kernels.attention.segment_ends(segment_ids) if segment_ends is None else segment_ends
    return AttentionMask(segment_ends=ends)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """`model.rope.rotate`; compiled graphs, which know no complex numbers, take it part by part."""
    if not torch.compiler.is_compiling():
        return rotate_pairs(x, rope)
    (real, imaginary), (cos, sin) = (pairs.unbind(-1) for pairs in (x.float().unflatten(-1, (-1, 2)), rope))
    turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


def causal_attention(
    q_BTHQ: Tensor,
    kv_BSHE: Tensor,
    k_rope_BSR: Tensor,
    rope: Tensor,
    scale: float,
    mask: AttentionMask,
    prefill: bool = False,
) -> Tensor:
    """softmax(q k^T * scale) v of the last T of S positions (Eq. 10), (B, T, H, value).

    Args:
        q_BTHQ: [q^C | q^R] of each head, not rotated yet; kv_BSHE: [k^C | v]; k_rope_BSR: k^R, rotated, for all heads.
        rope: from `RotaryEmbedding`, of the T positions.
        prefill: for a cache: without gradients, so that what is computed need not have the bits of training.
    """
    if prefill and kernels.causal.prefill_fits(q_BTHQ) and (mask.plain or mask.padding is not None):
        return kernels.causal.prefill(q_BTHQ, kv_BSHE, k_rope_BSR, rope, scale, mask.padding)
    if mask.plain and kernels.causal.fits(q_BTHQ, kv_BSHE, k_rope_BSR):
        return kernels.causal.CausalAttention.apply(q_BTHQ, kv_BSHE, k_rope_BSR, rope, scale)
    rope_size, heads = k_rope_BSR.shape[-1], q_BTHQ.shape[2]
    nope = q_BTHQ.shape[-1] - rope_size
    q_nope, q_rope = q_BTHQ.split((nope, rope_size), dim=-1)
    k_nope, v = kv_BSHE.split((nope, kv_BSHE.shape[-1] - nope), dim=-1)
    q = torch.cat((q_nope, rotate(q_rope, rope)), dim=-1)
    k = torch.cat((k_nope, k_rope_BSR.unsqueeze(2).expand(-1, -1, heads, -1)), dim=-1)
    return attend(q, k, v, scale, mask)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: AttentionMask) -> Tensor:
    """softmax(q k^T * scale) v. q, k: (batch, time, heads, qk); v: (batch, time, heads, value), as the result is."""
    value_size, sizes = v.shape[-1], (q.shape[1], k.shape[1], q.device)
    if kernels.on_cpu(q) and q.shape[1] <= kernels.attention.LONGEST_CHUNKED:
        # Causality alone needs no mask where the softmax knows of it.
        causal_only = mask.allowed is None and kernels.fused.available(q)
        allowed = None if causal_only else mask.as_bool(*sizes)
        added = None if allowed is None else torch.zeros_like(allowed, dtype=q.dtype).masked_fill_(~allowed, -torch.inf)
        # Autocast would carry each softmax through memory in float32; the kernel computes in float32 anyway.
        with torch.autocast("cpu", enabled=False):
            return kernels.attention.ChunkedAttention.apply(q, k, v, added, causal_only, scale)
    # The fused kernels want one head size for q, k and v: zeros added to v change nothing and are cut off again.
    if value_size < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - value_size))
    plain = mask.plain and q.shape[1] == k.shape[1]
    if mask.segment_ends is not None:
        return kernels.attention.segments(q, k, v, scale, mask.segment_ends)[..., :value_size]
    if plain and kernels.attention.cuda_kernel(q, q.shape[-1], value_size) == kernels.attention.FLASH_ATTN:
        out = kernels.attention.flash_attention().flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
        return out[..., :value_size]
    q, k, v, allowed = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None if plain else mask.as_bool(*sizes)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=plain, scale=scale)
    return out.transpose(1, 2)[..., :value_size]


def small_products(x: Tensor) -> Tensor:
    """x in the type of products with a few rows: on a CPU bfloat16's kernels cost more than they save."""
    return x.float() if kernels.on_cpu(x) and x.dtype == torch.bfloat16 else x


def route(router: Router, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (N, K) float32 and indices (N, K) of the router, where nobody asks for gradients or scores."""
    watched = router._forward_hooks or router._forward_pre_hooks
    fits = x_ND.is_contiguous() and type(router.weight) is nn.Parameter and kernels.fused.fits(x_ND)
    if torch.is_grad_enabled() or watched or not fits or router.e_score_correction_bias.dtype != torch.float32:
        return router(x_ND)[:2]
    c, weight, bias = router.config, router.weight.float(), router.e_score_correction_bias
    groups = (c.n_group, c.topk_group)
    return kernels.fused.route(
        x_ND, weight, bias, c.num_experts_per_tok, groups, c.norm_topk_prob, c.routed_scaling_factor
    )


def autocast(x: Tensor) -> Tensor:
    """x in the type of autocast where that is on, so that what follows is."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def run_experts(module: Experts, x_ND: Tensor, *routed: Tensor | Mapping) -> Tensor:
    """`dispatched` of the experts; for few tokens without gradients what needs no order of rows.

    routed: weights_NK, indices_NK, corrections.
    """
    if kernels.on_cpu(x_ND):
        experts = _experts_outside_graphs if torch.compiler.is_compiling() else _experts_on_cpu
        return experts(module, x_ND, *routed)
    weights_NK, indices_NK, corrections = routed
    dense = not corrections and isinstance(module.gate_up_proj, Tensor) and not torch.is_grad_enabled()
    if dense and len(x_ND) <= FEW_TOKENS and not kernels.grouped_cuda.without_host(x_ND.dtype, x_ND.device):
        return kernels.grouped_cuda.without_rows(x_ND, weights_NK, indices_NK, module.gate_up_proj, module.down_proj)
    return module.dispatched(x_ND, *routed)


def _experts_on_cpu(
    module: Experts, x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor, corrections: Mapping
) -> Tensor:
    """The number of rows is read from the data: a compiled graph would hold for one step."""
    if indices_NK.numel() <= FEW_CHOICES and _in_turn(module, x_ND, corrections):
        weights = weights_NK.to(x_ND.dtype)
        return kernels.grouped.few_experts(x_ND, weights, indices_NK, module.gate_up_proj, module.down_proj)
    return module.dispatched(x_ND, weights_NK, indices_NK, corrections)


# torch.compiler.disable, but torch._dynamo, which takes as long as torch itself, is imported at the first call.
_experts_outside_graphs = torch._disable_dynamo(_experts_on_cpu)


def expert_rows(module: Experts, x_ND: Tensor, weights_R: Tensor, plan: Plan, corrections: Mapping) -> Tensor:
    """`rows` of the experts; without gradients on a CPU one expert after the other, the same bits."""
    if kernels.on_cuda(x_ND) and not kernels.grouped_cuda.without_host(x_ND.dtype, x_ND.device):
        # The host waits for the device here, once a layer.
        plan = replace(plan, ends=kernels.grouped_cuda.read_ends(plan.ends))
    if not _in_turn(module, x_ND, corrections):
        return module.rows(x_ND, weights_R, plan, corrections)
    weights = (module.gate_up_proj, module.down_proj)
    return kernels.grouped.experts_in_turn(x_ND, weights_R, plan.token_of_row, plan.ends.tolist(), *weights)


def _in_turn(module: Experts, x_ND: Tensor, corrections: Mapping) -> bool:
    plain = not corrections and isinstance(module.gate_up_proj, Tensor)
    return plain and kernels.on_cpu(x_ND) and not torch.is_grad_enabled()


def sort_by_expert(expert_of_choice: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(N * K,) numbers below `experts` in their order, those of one expert as they came, and where each was."""
    if not kernels.on_cuda(expert_of_choice):
        return expert_of_choice.sort(stable=True)
    # A radix sort goes over its keys once for each of their bytes, of which int64 has eight.
    order = expert_of_choice.to(torch.uint8 if experts <= 256 else torch.int16).sort(stable=True).indices
    return expert_of_choice[order], order


def row_tile(module: Experts, x_ND: Tensor, corrections: Mapping) -> int | None:
    """The block that rows are padded to where one call computes all experts, whatever their number; else None."""
    suits = kernels.grouped.suits(x_ND, module.gate_up_proj, module.down_proj)
    return kernels.grouped.TILE if suits and not _in_turn(module, x_ND, corrections) else None


def row_block(indices_NK: Tensor, experts: int) -> int:
    """The block elsewhere: little of each expert's share is wasted, and few shapes occur."""
    if kernels.on_cuda(indices_NK):
        return SMALL_ROW_BLOCK
    mean_rows, smallest = indices_NK.numel() / experts, SMALL_ROW_BLOCK if len(indices_NK) > 1 else 1
    return next((block for block in ROW_BLOCKS if mean_rows >= 4 * block), smallest)


def padded_rows(counts_E: Tensor, choices: int, block: int) -> tuple[Tensor, int]:
    """The rows of each expert, whole blocks, and how many there are of all or, on CUDA, can be at most."""
    blocks, experts = (counts_E + block - 1) // block, len(counts_E)
    if not kernels.on_cuda(counts_E):
        return blocks * block, int(blocks.sum()) * block
    # On sm100 the weight gradient of a group without rows is garbage (pytorch/pytorch#172439): where gradients are
    # recorded each expert has a block, of padding whose weight is 0. Decoding reads the chosen experts only.
    fill = torch.is_grad_enabled()
    # The number of rows is not known to the host: take the most there can be, one block an expert begun.
    begun = experts if fill else min(experts, choices)
    return (blocks.clamp(min=1) if fill else blocks) * block, (choices // block + begun) * block


def grouped_linear(
    x_RD: Tensor, weight_EOD: Tensor | QuantizedWeight, ends_E: Tensor, buffer: GradBuffer | None = None
) -> Tensor:
    """Each expert's rows times its own matrix: (R, D) x (E, O, D) -> (R, O).

    Args:
        weight_EOD: a tensor or a `QuantizedWeight`; ends_E: one past the last row of each expert, from `expert_rows`.
        buffer: memory for the weight's gradient.
    """
    if kernels.on_cuda(x_RD):
        without_host = kernels.grouped_cuda.without_host(x_RD.dtype, x_RD.device)
        product = kernels.grouped_cuda.grouped_mm if without_host else kernels.grouped_cuda.LoopedLinear.apply
        return product(x_RD, weight_EOD, ends_E)
    return kernels.grouped.GroupedLinear.apply(x_RD, weight_EOD, ends_E.tolist(), buffer or grad_buffer())


def grad_buffer() -> GradBuffer:
    """Memory for the gradient of a stack of weights, used again in each step."""
    return kernels.grouped.GradBuffer()


def gather_sum(rows_RD: Tensor, row_of_choice: Tensor) -> Tensor:
    """(R, D), (N, K) -> (N, D): the sum of each token's K rows."""
    if kernels.on_cuda(rows_RD):
        rows_NKD = rows_RD.index_select(0, row_of_choice.flatten()).unflatten(0, row_of_choice.shape)
        return rows_NKD.sum(1, dtype=rows_RD.dtype)  # autocast would make it float32, and the residual stream with it
    if kernels.fused.fits(rows_RD) and rows_RD.is_contiguous():
        return kernels.fused.gather_sum(rows_RD, row_of_choice)
    # K additions of contiguous rows are several times faster than a sum over a middle axis.
    first, *others = row_of_choice.unbind(1)
    total = rows_RD.index_select(0, first)
    for rows in others:
        total += rows_RD.index_select(0, rows)
    return total


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """-log p_y, (N,) float32, and its gradient by the logits, p - onehot(y), in their type and perhaps their memory.

    Both are 0 where a label is negative, and computed in float32: rounded to bfloat16 first, a p of 0.999 would be 1,
    without loss and gradient.
    """
    if kernels.fused.available(logits_NV):
        return kernels.fused.cross_entropy_(logits_NV, labels_N.contiguous()), logits_NV
    counted, target = labels_N >= 0, labels_N.clamp(min=0)
    log_p = logits_NV.log_softmax(-1, dtype=torch.float32)
    nll_N = -log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    error_NV = log_p.exp_()
    error_NV[torch.arange(len(target), device=target.device), target] -= 1  # scatter_add_ would copy all of it
    return nll_N.masked_fill(~counted, 0), torch.mul(error_NV, counted.unsqueeze(1), out=logits_NV)
