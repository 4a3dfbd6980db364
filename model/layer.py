"""One Transformer layer: attention and feed-forward, each after a norm and added to the residual stream."""

from __future__ import annotations

from pkgutil import resolve_name

from torch import Tensor, nn

from LMConfig import LMConfig
from model.attention import AttentionMask, select_positions
from model.cache import Cache
from model.mla import MultiHeadLatentAttention
from model.moe import DeepseekMoE, Routing, SwiGLU
from model.norm import RMSNorm


class DecoderLayer(nn.Module):
    """MLA, then a dense SwiGLU in the first `first_k_dense_replace` layers and DeepSeekMoE in the others (Figure 2)."""

    def __init__(self, config: LMConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        kind = MultiHeadLatentAttention
        if config.attention != "mla":  # to compare it with
            kind = resolve_name("model.variants:GroupedAttention")
        self.self_attn = kind(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.is_moe_layer(layer)
        self.mlp = DeepseekMoE(config) if self.is_moe else SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        attention_mask: AttentionMask,
        cache: Cache | None = None,
        token_mask_BT: Tensor | None = None,
        last_positions_B: Tensor | None = None,
        replayed_BTK: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x: (batch, time, hidden) -> the same, and what the router did (None in a dense layer).

        last_positions: the only position of each row that is asked for: -> (batch, 1, hidden). replayed: experts to
        take, see `model.moe.Router`.
        """
        attended = self.self_attn(self.input_layernorm(x), rope, attention_mask, cache, last_positions_B)
        x = (x if last_positions_B is None else select_positions(x, last_positions_B)) + attended
        inner = self.post_attention_layernorm(x)
        if self.is_moe:
            out, routing = self.mlp(inner, token_mask_BT, cache is None or cache.counts_loads, replayed_BTK)
            return x + out, routing
        return x + self.mlp(inner), None
