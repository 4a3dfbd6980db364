"""The interface of decoding, in plain PyTorch; the runners in C and as a CUDA graph take over what they do faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from model.attention import AttentionMask
from model.cache import LatentCache
from model.ops import head_logits

if TYPE_CHECKING:
    from model.transformer import MiniDeepSeek

PREFILL_TOKENS = 4096  # in one pass: with more, memory that is always new costs more than larger products save


class Step(NamedTuple):
    """What a step gives.

    Attributes:
        states: (batch, time, hidden) before the final norm, which is what MTP continues from.
        logits: (batch, last, vocab) float32 of each row's last positions.
        choice: (batch, last) their likeliest tokens; confidence: (batch, last) how likely these are.
    """

    states: Tensor
    logits: Tensor
    choice: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, states: Tensor, logits: Tensor) -> Step:
        confidence, choice = logits.softmax(-1).max(-1)
        return cls(states, logits, choice, confidence)


class EagerRunner:
    """A model over a cache, without gradients. While one is in use the weights stay as they are, and where they are.

    Attributes:
        any_rows: steps of up to so many rows take any number; of more, those of a few sizes are faster.
    """

    any_rows = 0

    def __init__(self, model: MiniDeepSeek, cache: LatentCache) -> None:
        self.model, self.cache, self.head = model, cache, model.lm_head.weight

    def prefill(self, ids: Tensor, last_positions: Tensor | None = None) -> Tensor:
        """Read prompts (batch, time), some rows at a time; return logits (batch, vocab) float32 of what follows them.

        last_positions: (batch,) where the last token of each row is; by default in the last column.
        """
        batch, time = ids.shape
        if last_positions is None:
            last_positions = torch.full((batch,), time - 1, device=ids.device)
        hidden, at_once = [], max(PREFILL_TOKENS // time, 1)
        for start in range(0, batch, at_once):
            rows = slice(start, start + at_once)
            hidden.append(self._last_hidden(ids[rows], self.cache.part(rows), last_positions[rows]))
        self.cache.reserve(range(self.model.config.num_hidden_layers), time)
        return head_logits(torch.cat(hidden), self.head)

    def _last_hidden(self, ids: Tensor, cache: LatentCache, last_positions: Tensor) -> Tensor:
        """(batch, hidden) after the final norm: of the other positions the last layer computes only latents."""
        model, (*layers, last) = self.model, self.model.model.layers
        rope, mask = model.rotary(cache.begin(*ids.shape)), cache.mask(ids.shape[1])
        state = model.embed(ids)
        for layer in layers:
            state, _ = layer(state, rope, mask, cache)
        state, _ = last(state, rope, mask, cache, None, last_positions)
        return model.model.norm(state).squeeze(1)

    def step(self, ids: Tensor, last: int = 1) -> Step:
        """Read ids (batch, time), which follow what the cache holds. Return logits of the `last` positions."""
        out = self.model(ids, cache=self.cache)
        return Step.of(out.state, head_logits(out.hidden[:, -last:], self.head))

    def draft(self, state: Tensor, ids: Tensor, depth: int) -> Step:
        """Let the MTP layer `depth` (1 .. D) join state (batch, time, hidden) with ids (batch, time).

        They are the tokens `depth` places after each position; the logits of the last position are about the token
        after those. The cache has room for MTP.
        """
        model, layer = self.model, self.model.mtp[depth - 1]
        held = self.cache.lengths[model.config.num_hidden_layers + depth - 1]
        positions = torch.arange(held, held + ids.shape[1], device=ids.device)[None]
        state = state.to(self.head.dtype)
        embedding = model.model.embed_tokens(ids).to(state.dtype)
        state, _ = layer(state, embedding, model.rotary(positions), AttentionMask(), self.cache)
        return Step.of(state, head_logits(layer.shared_head.norm(state[:, -1:]), self.head))

    def greedy_pass(self, *_: Any) -> Any:
        """Return what drafts and verifies greedily in one call, or None; see `NativeRunner.greedy_pass`."""
