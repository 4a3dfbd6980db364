"""Speculative decoding: the MTP chain drafts, one pass of the main model verifies (DeepSeek-V3 section 5.4.3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.cache import LatentCache, cache_dtype
from model.transformer import MiniDeepSeek


@torch.inference_mode()
def stream_speculative(
    model: MiniDeepSeek,
    input_ids: Tensor,
    max_new_tokens: int,
    stop: tuple[int, ...] = (),
    accepted: list[int] | None = None,
) -> Iterator[int]:
    """Greedy tokens of one prompt, the same as plain decoding's, up to D + 1 a pass.

    The main model reads the last token and its D drafts at once. It keeps the drafts that it would have chosen itself,
    and adds one token of its own.

    Args:
        input_ids: (1, time). accepted: receives the number of drafts kept by each pass.
    """
    device, time = input_ids.device, input_ids.shape[1]
    longest = time + max_new_tokens + len(model.mtp) + 1
    cache = LatentCache(model.config, 1, longest, cache_dtype(model), device, mtp=True)
    chain = _DraftChain(model, cache)
    out = model(input_ids, cache=cache)
    tokens = [*input_ids[0].tolist(), int(out.logits[0, -1].argmax())]
    states, written = out.state, 0
    while max_new_tokens > 0:
        for token in tokens[time + written :]:
            written += 1
            yield token
            if token in stop or written == max_new_tokens:
                return
        drafts = chain.draft(states, tokens)
        held = cache.length
        out = model(torch.tensor([[tokens[-1], *drafts]], device=device), cache=cache)
        chosen = out.logits[0].argmax(-1).tolist()
        right = next((i for i, draft in enumerate(drafts) if draft != chosen[i]), len(drafts))
        if accepted is not None:
            accepted.append(right)
        tokens += chosen[: right + 1]
        states = out.state[:, : right + 1]
        cache.truncate(held + right + 1)


class _DraftChain:
    """The MTP layers as drafters, each with its own latent cache.

    With n tokens known, the main model has seen n-1 of them. Depth k joins, for position t, the state of depth k-1 with
    token t+k, so its last k-1 positions rest on drafts: they are computed anew once the tokens are known.
    """

    def __init__(self, model: MiniDeepSeek, cache: LatentCache) -> None:
        self.model, self.cache = model, cache
        # For each depth the state of the depth before at the first position that must be computed anew.
        self.carried: list[Tensor | None] = [None] * (len(model.mtp) + 1)

    def draft(self, states: Tensor, tokens: list[int]) -> list[int]:
        """D tokens after `tokens`. states: (1, new, hidden) of the main model at the positions it has seen since."""
        known, line, carried = len(tokens), list(tokens), list(self.carried)
        for depth in range(1, len(self.model.mtp) + 1):
            layer = self.model.config.num_hidden_layers + depth - 1
            start = self.cache.lengths[layer]
            if (doubtful := carried[depth - 1]) is not None:
                states = torch.cat((doubtful, states), dim=1)
            ids = torch.tensor([line[start + depth : start + depth + states.shape[1]]], device=states.device)
            logits, states = self.model.draft(states, ids, depth, self.cache)
            self.cache.truncate(max(known - depth, 0), layer)
            # The next depth's first doubtful position is one before this one's.
            at = known - depth - 1 - start
            self.carried[depth] = states[:, at : at + 1] if at >= 0 else None
            line.append(int(logits[0, -1].argmax()))
        return line[known:]
