"""Multi-token prediction (DeepSeek-V3 section 2.2): a chain of D extra layers, each predicting one token further."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from LMConfig import LMConfig
from model.attention import AttentionMask
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

    def forward(self, hidden_BTD: Tensor, embedding_BTD: Tensor, *others: Any) -> tuple[Tensor, Routing | None]:
        """Return the state for the next depth (before `shared_head.norm`), (batch, time, hidden), and the routing.

        hidden: the state of depth k-1, before its final norm; embedding: of the token k places further on; the others
        as in `DecoderLayer.forward`.
        """
        return super().forward(self.join(hidden_BTD, embedding_BTD), *others)


class MTPOutput(NamedTuple):
    """Attributes: hidden, unrolled: see `model.transformer.Output`; routings: of the D layers."""

    hidden: tuple[Tensor, ...] = ()
    unrolled: tuple[Tensor, ...] = ()
    routings: tuple[Routing | None, ...] = ()


class MTPChain(nn.ModuleList):
    """The depths 1 .. D over the tokens at hand, and the last one unrolled further.

    Beyond D the last layer can continue from its own state: for position u it joins its state of u-1, in place of depth
    D-1's of u, which needs a token not yet known, with token u+D, and predicts u+D+1. The paper has a layer for each
    further token; sharing one is what EAGLE (Li et al. 2024) does, and serving engines with the released weights. A
    layer that has met its own states in training (EAGLE-3, Li et al. 2025) drafts further tokens better.
    """

    def forward(
        self,
        state: Tensor,
        embedding: Tensor,
        rope: Tensor,
        attention_mask: AttentionMask,
        segment_ids: Tensor | None,
        steps: int,
        run: Callable[..., tuple[Tensor, Routing | None]] = lambda layer, *inputs: layer(*inputs),
    ) -> MTPOutput:
        """Run every depth, and the last one for `steps` in all; the later ones do not count in the experts' loads.

        state: (batch, time, hidden) of the main model, before its final norm; run: calls a layer.
        """
        batch, time, _ = embedding.shape
        places = torch.arange(time, device=embedding.device)
        hidden, unrolled, routings, latents = [], [], [], {}
        for depth, layer in enumerate(self, start=1):
            # Position t meets token t+depth. The last `depth` positions meet none: losses leave them out.
            ahead = embedding.roll(-depth, dims=1)
            counted = (places < time - depth).expand(batch, time)
            counted = counted if segment_ids is None else counted & (segment_ids >= 0)
            step = UnrolledMTPStep(latents, 1) if steps > 1 and depth == len(self) else None
            state, routing = run(layer, state, ahead, rope, attention_mask, step, counted)
            hidden.append(layer.shared_head.norm(state))
            routings.append(routing)
        for number in range(2, steps + 1 if hidden else 0):
            # Position t meets the state of t-1. The first positions of a segment meet none: see `Output.mtp_unrolled`.
            step = UnrolledMTPStep(latents, number)
            mask = step.mask_within(time, segment_ids, embedding.device)
            state, _ = run(layer, state.roll(1, dims=1), ahead, rope, mask, step, counted)
            unrolled.append(layer.shared_head.norm(state))
        return MTPOutput(tuple(hidden), tuple(unrolled), tuple(routings))


class UnrolledMTPStep:
    """Step j = 1, 2, ... of the last MTP layer in training on its own state, as `model.decoding.speculative` chains it.

    Step 1 is the layer's ordinary pass. In step j, position u stands for a draft whose chain began at u - (j-1): of the
    positions up to there the layer sees the latents of step 1, then of each following one that of the next step.
    """

    decoding, counts_loads = False, True

    def __init__(self, latents: dict[int, Tensor], step: int) -> None:
        self.latents, self.step = latents, step

    def append(self, layer: int, latent_BTC: Tensor) -> Tensor:
        """Return (batch, j time, C): the latents of each step, one step behind the other."""
        self.latents[self.step] = latent_BTC  # by number: recomputation of activations comes here twice
        return torch.cat([self.latents[step] for step in range(1, self.step + 1)], dim=1)

    def mask_within(self, time: int, segment_ids: Tensor | None, device: torch.device) -> AttentionMask:
        """Return which of them each position sees, (batch or 1, 1, time, j time) bool; j is 2 or more."""
        behind = torch.arange(time, device=device)[:, None] - torch.arange(time, device=device)
        first = behind >= self.step - 1
        chain = [behind == self.step - step for step in range(2, self.step + 1)]
        if segment_ids is None:
            return AttentionMask(torch.cat((first, *chain), dim=1)[None, None])
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        allowed = torch.cat((first & same, *(part.expand_as(same) for part in chain)), dim=2)
        return AttentionMask(allowed[:, None])
