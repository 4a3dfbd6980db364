"""Attention to compare MLA with: multi-head (MHA) and grouped-query attention (GQA), which cache whole keys and values.

`--model.attention mha`, or `--model.attention gqa --model.num_key_value_heads 2`. The sizes of heads follow from the
MLA that all other fields describe, at equal parameters: `model.costs.equal_head_size`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from LMConfig import LMConfig
from model.attention import AttentionMask, select_positions
from model.cache import Cache
from model.ops import Linear, attend, rotate, small_products
from model.rope import softmax_scale

FEW = 8  # up to so many new positions read the cache as it is; beyond, whole keys of every head are cheaper


class GroupedAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with RoPE on all of q and k (Vaswani et al. 2017; Su et al. 2021).

    Neighbouring heads share one key and value (Ainslie et al. 2023); each has its own where there are as many (MHA).
    Shapes: B batch, T new positions, S all positions, H heads, G heads of keys and values, D their size.
    """

    def __init__(self, config: LMConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.scale = layer, softmax_scale(config)
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.size, self.value = config.qk_head_dim, config.v_head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = Linear(hidden, self.heads * self.size, bias=bias)
        self.k_proj = Linear(hidden, self.groups * self.size, bias=bias)
        self.v_proj = Linear(hidden, self.groups * self.value, bias=bias)
        self.o_proj = Linear(self.heads * self.value, hidden, bias=bias)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        attention_mask: AttentionMask,
        cache: Cache | None = None,
        last_positions_B: Tensor | None = None,
    ) -> Tensor:
        """As `model.mla.MultiHeadLatentAttention.forward`. Of each position [k after RoPE ; v] of G heads is cached."""
        k_BTGD = rotate(self.k_proj(x).unflatten(-1, (self.groups, -1)), rope)
        kv_BSC = torch.cat((k_BTGD.flatten(2), self.v_proj(x)), dim=-1)
        if cache is not None:
            kv_BSC = cache.append(self.layer, kv_BSC)
        if last_positions_B is not None:
            attention_mask = attention_mask.at(last_positions_B, x.shape[1], kv_BSC.shape[1])
            x, rope = select_positions(x, last_positions_B), select_positions(rope, last_positions_B)
        q_BTHD = rotate(self.q_proj(x).unflatten(-1, (self.heads, -1)), rope)
        if cache is not None and cache.decoding and x.shape[1] <= FEW:
            out = self.attend_cached(q_BTHD, *self._split(small_products(kv_BSC)), attention_mask)
        else:
            k, v = (
                each.repeat_interleave(self.heads // self.groups, 2) for each in self._split(kv_BSC.to(q_BTHD.dtype))
            )
            out = attend(q_BTHD, k, v, self.scale, attention_mask)
        return self.o_proj(out.flatten(2))

    def attend_cached(self, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, attention_mask: AttentionMask) -> Tensor:
        """The same numbers without a key and a value for every head: heads that share one are rows of one product.

        In the type of the keys. Returns (B, T, H, value).
        """
        batch, time, *_ = q_BTHD.shape
        q_BHTD = q_BTHD.to(k_BSGD.dtype).transpose(1, 2)
        q_BGRD = q_BHTD.reshape(batch, self.groups, -1, self.size)  # R = H / G * T rows
        scores = (q_BGRD @ k_BSGD.permute(0, 2, 3, 1)).float().mul_(self.scale)
        allowed = attention_mask.as_bool(time, k_BSGD.shape[1], k_BSGD.device)
        if allowed is not None:
            scores.view(batch, self.heads, time, -1).masked_fill_(~allowed, float("-inf"))
        out = scores.softmax(dim=-1).to(v_BSGD.dtype) @ v_BSGD.transpose(1, 2)
        return out.view(batch, self.heads, time, self.value).transpose(1, 2).to(q_BTHD.dtype)

    def _split(self, kv_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, G, D) keys and (B, S, G, value) values."""
        k, v = kv_BSC.split((self.groups * self.size, self.groups * self.value), dim=-1)
        return k.unflatten(-1, (self.groups, -1)), v.unflatten(-1, (self.groups, -1))
