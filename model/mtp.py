"""Multi-token prediction (DeepSeek-V3 section 2.2): a chain of D extra layers, each predicting one token further."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from LMConfig import LMConfig
from model.attention import AttentionMask
from model.cache import Cache
from model.layer import DecoderLayer
from model.moe import Routing
from model.norm import RMSNorm
from model.ops import Linear


class SharedHead(nn.Module):
    """The norm before the output head, which itself is the main model's."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(DecoderLayer):
    """Depth k: joins the hidden state of position t with the embedding of token t+k and predicts token t+k+1.

    Embedding and output head are the main model's. `layer` counts on from the main layers, as in the released weights.

    Beyond D the last layer can go on from its own state: for position u it joins its state of u-1, in place of depth
    D-1's state of u, which needs a token that is not yet known, with token u+D, and predicts u+D+1. The paper has a
    layer of its own for each further token; sharing one is what EAGLE (Li et al. 2024) does, and what serving engines
    do with the one MTP layer of the released weights. A layer that has met its own states in training, over the latents
    that it will then see (`MiniDeepSeek.forward(mtp_steps=K)`; EAGLE-3, Li et al. 2025), drafts further tokens better.
    """

    def __init__(self, config: LMConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)  # M_k
        self.shared_head = SharedHead(config)

    def join(self, hidden_BTD: Tensor, embedding_BTD: Tensor) -> Tensor:
        """Eq. 21. The released weights expect [embedding ; hidden]; the paper prints the other order."""
        return self.eh_proj(torch.cat((self.enorm(embedding_BTD), self.hnorm(hidden_BTD)), dim=-1))

    def forward(
        self,
        hidden_BTD: Tensor,
        embedding_BTD: Tensor,
        rope: Tensor,
        attention_mask: AttentionMask,
        cache: Cache | None = None,
        token_mask_BT: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Returns the state for the next depth (before `shared_head.norm`), (batch, time, hidden), and the routing.

        Args:
            hidden_BTD: the state of depth k-1, before its final norm.
            embedding_BTD: the embedding of the token k places further on.
        """
        return super().forward(self.join(hidden_BTD, embedding_BTD), rope, attention_mask, cache, token_mask_BT)
