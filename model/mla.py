"""Multi-head Latent Attention (DeepSeek-V3 section 2.1.1), naive and absorbed side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from LMConfig import LMConfig
from model.attention import AttentionMask, select_positions
from model.cache import Cache
from model.norm import RMSNorm
from model.ops import Linear, causal_attention, rotate, small_products
from model.rope import softmax_scale

# Up to this many new positions the absorbed form reads the latents as they are; beyond, expanding them once is cheaper.
ABSORB_UP_TO = 8


class MultiHeadLatentAttention(nn.Module):
    """Keys and values come from one small latent c^KV per position; with RoPE, one shared key k^R beside it.

    Shapes: B batch, T new positions, S all positions, H heads, C = kv_lora_rank + rope.
    """

    def __init__(self, config: LMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rank = config.kv_lora_rank
        self.scale = softmax_scale(config)
        hidden, bias = config.hidden_size, config.attention_bias
        query_size = self.heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, query_size, bias=False)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias=bias)  # W^DQ
            # The inner norms keep eps 1e-6 whatever rms_norm_eps says, as in the released code.
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=1e-6)
            self.q_b_proj = Linear(config.q_lora_rank, query_size, bias=False)  # W^UQ and W^QR
        self.kv_a_proj_with_mqa = Linear(hidden, self.rank + self.rope, bias=bias)  # W^DKV and W^KR
        self.kv_a_layernorm = RMSNorm(self.rank, eps=1e-6)
        self.kv_b_proj = Linear(self.rank, self.heads * (self.nope + self.value), bias=False)  # W^UK and W^UV
        self.o_proj = Linear(self.heads * self.value, hidden, bias=bias)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        attention_mask: AttentionMask,
        cache: Cache | None = None,
        last_positions_B: Tensor | None = None,
    ) -> Tensor:
        """x: (B, T, hidden) -> (B, T, hidden). With a cache, its positions come first and the new ones are added.

        last_positions: the only position of each row that attends, where one is enough: -> (B, 1, hidden).
        """
        latent_BSC = self._latents(x, rope)
        if cache is not None:
            latent_BSC = cache.append(self.layer, latent_BSC)
        if last_positions_B is not None:
            attention_mask = attention_mask.at(last_positions_B, x.shape[1], latent_BSC.shape[1])
            x, rope = select_positions(x, last_positions_B), select_positions(rope, last_positions_B)
        q_BTHQ, decodes = self._queries(x), cache is not None and cache.decoding
        if decodes and x.shape[1] <= ABSORB_UP_TO:
            latent_BSC = small_products(latent_BSC)
            out = self.attend_absorbed(*self._rotated(q_BTHQ, rope), latent_BSC, attention_mask)
        else:
            out = self.attend_naive(q_BTHQ, rope, latent_BSC.to(q_BTHQ.dtype), attention_mask, prefill=decodes)
        return self.o_proj(out.flatten(2))

    def attend_naive(
        self, q_BTHQ: Tensor, rope: Tensor, latent_BSC: Tensor, attention_mask: AttentionMask, prefill: bool = False
    ) -> Tensor:
        """Expand the latents to keys and values of every head (Eq. 2, 4 and 5), then attend: for training and prefill.

        q: (B, T, H, nope + rope), not yet rotated. Returns (B, T, H, value).
        """
        c_kv, k_rope = latent_BSC.split((self.rank, self.rope), dim=-1)
        kv_BSHE = self.kv_b_proj(c_kv).unflatten(-1, (self.heads, -1))
        return causal_attention(q_BTHQ, kv_BSHE, k_rope, rope, self.scale, attention_mask, prefill)

    def absorbed_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W^UK (H, nope, rank) and W^UV (H, rank, value) of every head, as views where the weight is plain."""
        if isinstance(self.kv_b_proj, Linear):
            weight = self.kv_b_proj.weight
        else:  # quantized, or with an adapter around it: what it makes of each unit of the latent
            weight = self.kv_b_proj(torch.eye(self.rank, device=self.kv_a_layernorm.weight.device)).t()
        w_uk, w_uv = weight.to(dtype).unflatten(0, (self.heads, -1)).tensor_split((self.nope,), dim=1)
        return w_uk, w_uv.transpose(1, 2)

    def attend_absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent_BSC: Tensor, attention_mask: AttentionMask
    ) -> Tensor:
        """The same numbers, reading the latents only: (q W^UK) c = q (W^UK c), and W^UV after the weighted sum.

        In the type of the latents.
        """
        dtype = latent_BSC.dtype
        batch, time = q_nope.shape[:2]
        w_uk, w_uv = self.absorbed_weights(dtype)
        q_absorbed = q_nope.to(dtype).flatten(0, 1).transpose(0, 1) @ w_uk
        q_BTHC = torch.cat((q_absorbed.transpose(0, 1).view(batch, time, self.heads, -1), q_rope.to(dtype)), dim=-1)
        # All heads share the latents, so new positions and heads form the rows of one product.
        scores = torch.bmm(q_BTHC.flatten(1, 2), latent_BSC.transpose(1, 2)).float().mul_(self.scale)
        allowed = attention_mask.as_bool(time, latent_BSC.shape[1], latent_BSC.device)
        if allowed is not None:
            allowed = allowed.transpose(1, 2) if allowed.dim() == 4 else allowed.unsqueeze(1)
            scores.view(batch, time, self.heads, -1).masked_fill_(~allowed, float("-inf"))
        weights = scores.softmax(dim=-1).to(dtype)
        out = torch.bmm(weights, latent_BSC[..., : self.rank]).view(batch * time, self.heads, self.rank)
        out = out.transpose(0, 1) @ w_uv
        return out.transpose(0, 1).reshape(batch, time, self.heads, self.value).to(q_nope.dtype)

    def _queries(self, x: Tensor) -> Tensor:
        """(B, T, H, nope + rope), not rotated (Eq. 6 and 7)."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if hasattr(self, "q_a_proj") else self.q_proj(x)
        return q.unflatten(-1, (self.heads, -1))

    def _rotated(self, q_BTHQ: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, H, nope) and (B, T, H, rope), the latter rotated (Eq. 8 and 9)."""
        q_nope, q_rope = q_BTHQ.split((self.nope, self.rope), dim=-1)
        return q_nope, rotate(q_rope, rope)

    def _latents(self, x: Tensor, rope: Tensor) -> Tensor:
        """(B, T, C): [c^KV after its norm ; k^R after RoPE] (Eq. 1 and 3), which is also what is cached."""
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split((self.rank, self.rope), dim=-1)
        return torch.cat((self.kv_a_layernorm(c_kv), rotate(k_rope.unsqueeze(2), rope).squeeze(2)), dim=-1)
