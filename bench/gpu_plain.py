"""The network in plain operations and float64, written apart from the model that is checked against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import MiniDeepSeek


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x_BTHR: Tensor, positions_BT: Tensor, base: float) -> Tensor:
    """Turn each pair (x_2i, x_2i+1) by position * base^(-2i/d)."""
    size = x_BTHR.shape[-1]
    speed = base ** -(torch.arange(0, size, 2, dtype=torch.float64, device=x_BTHR.device) / size)
    angle = (positions_BT[..., None].double() * speed).unsqueeze(2)
    even, odd = x_BTHR[..., 0::2], x_BTHR[..., 1::2]
    turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(turned, dim=-1).flatten(-2)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def experts(x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """sum_k weight_k * expert_k(x), every expert for every token, those not chosen with weight 0."""
    share_NE = torch.zeros(len(x_ND), len(down), dtype=x_ND.dtype, device=x_ND.device)
    share_NE = share_NE.scatter(1, indices_NK, weights_NK.to(x_ND.dtype))
    out = torch.zeros_like(x_ND)
    for number, (both, last) in enumerate(zip(gate_up, down, strict=True)):
        gate, up = both.chunk(2)
        out = out + share_NE[:, number : number + 1] * swiglu(x_ND, gate, up, last)
    return out


def attention(module: nn.Module, x: Tensor, positions: Tensor, allowed: Tensor, base: float) -> Tensor:
    """Multi-head latent attention, every key and value expanded; allowed: (B or 1, T, T) bool."""
    heads, rank, nope = module.heads, module.rank, module.nope
    if hasattr(module, "q_a_proj"):
        low = norm(x @ module.q_a_proj.weight.t(), module.q_a_layernorm.weight, 1e-6)
        q = low @ module.q_b_proj.weight.t()
    else:
        q = x @ module.q_proj.weight.t()
    q_nope, q_rope = q.unflatten(-1, (heads, -1)).split((nope, module.rope), dim=-1)
    latent, k_rope = (x @ module.kv_a_proj_with_mqa.weight.t()).split((rank, module.rope), dim=-1)
    kv = norm(latent, module.kv_a_layernorm.weight, 1e-6) @ module.kv_b_proj.weight.t()
    k_nope, v = kv.unflatten(-1, (heads, -1)).split((nope, module.value), dim=-1)
    q = torch.cat((q_nope, rotate(q_rope, positions, base)), dim=-1)
    k_rope = rotate(k_rope.unsqueeze(2), positions, base).expand(-1, -1, heads, -1)
    scores = torch.einsum("bthd,bshd->bhts", q, torch.cat((k_nope, k_rope), dim=-1)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed.unsqueeze(1), -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v).flatten(2) @ module.o_proj.weight.t()


def hidden_states(model: MiniDeepSeek, ids: Tensor, segments: Tensor | None, chosen: list[Tensor]) -> Tensor:
    """(B, T, hidden) after the final norm of a model in float64, without YaRN.

    segments: (B, T), positions restart in each; chosen: (B T, K) of each MoE layer, the experts that are taken.
    """
    config, time, device = model.config, ids.shape[1], ids.device
    places = torch.arange(time, device=device)
    positions, allowed = places[None].expand_as(ids), (places[None] <= places[:, None])[None]
    if segments is not None:
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        positions = positions - torch.where(begins, positions, 0).cummax(1).values
        allowed = allowed & (segments[:, :, None] == segments[:, None, :])
    x, choices = model.model.embed_tokens.weight[ids], iter(chosen)
    for layer in model.model.layers:
        inner = norm(x, layer.input_layernorm.weight, config.rms_norm_eps)
        x = x + attention(layer.self_attn, inner, positions, allowed, config.rope_theta)
        inner, mlp = norm(x, layer.post_attention_layernorm.weight, config.rms_norm_eps), layer.mlp
        if not layer.is_moe:
            x = x + swiglu(inner, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
            continue
        flat, indices = inner.flatten(0, 1), next(choices)
        share = (flat @ mlp.gate.weight.t()).sigmoid().gather(1, indices)
        if config.norm_topk_prob:
            share = share / share.sum(-1, keepdim=True)
        share = share * config.routed_scaling_factor
        out = experts(flat, share, indices, mlp.experts.gate_up_proj, mlp.experts.down_proj).view_as(x)
        if (shared := mlp.shared_experts) is not None:
            out = out + swiglu(inner, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        x = x + out
    return norm(x, model.model.norm.weight, config.rms_norm_eps)


def loss_sum(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy over the labels that are not negative."""
    logits, flat = hidden.flatten(0, -2) @ head.t(), labels.flatten()
    return F.cross_entropy(logits, flat, ignore_index=-100, reduction="sum")
