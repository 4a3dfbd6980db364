"""Speculative decoding: the MTP layers draft, one pass of the main model verifies (DeepSeek-V3 section 5.4.3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.cache import LatentCache, cache_dtype
from model.decoding.eager import EagerRunner
from model.decoding.native import Drafter, check_vocabulary
from model.decoding.runner import runner_for
from model.decoding.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from model.transformer import MiniDeepSeek

MIN_DRAFT_CONFIDENCE = 0.4  # a draft is continued while all of it is accepted with this probability, by its estimate


@torch.inference_mode()
def stream_speculative(
    model: MiniDeepSeek,
    input_ids: Tensor,
    max_new_tokens: int,
    stop: tuple[int, ...] = (),
    accepted: list[tuple[int, int]] | None = None,
    draft_tokens: int = 0,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
    drafter: Drafter | None = None,
) -> Iterator[int]:
    """Yield the tokens of one prompt: greedy ones are plain decoding's, sampled ones of the same distribution.

    The main model reads the last token and its drafts at once, accepts them as far as they hold, and adds one.

    Args:
        input_ids: (1, time).
        accepted: receives of each pass how many drafts were accepted, and how many there were.
        draft_tokens: the most drafts a pass, 0: one for each MTP layer; further ones chain the last layer on itself.
        sampling: without repetition penalty.
        drafter: lighter copies of these weights, which greedy drafts on CPU are made with.
    """
    device, time = input_ids.device, input_ids.shape[1]
    check_vocabulary(input_ids, len(model.lm_head.weight))
    most = draft_tokens or len(model.mtp)
    cache = LatentCache(model.config, 1, time + max_new_tokens + most + 1, cache_dtype(model), device, mtp=True)
    runner = runner_for(model, cache)
    verifier = Verifier(sampling, None if seed is None else torch.Generator(device).manual_seed(seed))
    chain = DraftChain(runner, verifier, most)
    step = runner.step(input_ids)
    tokens = [*input_ids[0].tolist(), verifier.pick(step.choice, step.logits)]
    states, written = step.states, 0
    fused = runner.greedy_pass(tokens, states, most, MIN_DRAFT_CONFIDENCE, drafter) if verifier.greedy else None
    while max_new_tokens > 0:
        for token in tokens[time + written :]:
            written += 1
            yield token
            if token in stop or written == max_new_tokens:
                return
        if fused is not None:
            new, drafted = fused.run()
        else:
            drafts, drawn_from = chain.draft(states, tokens)
            held, drafted = cache.length, len(drafts)
            step = runner.step(torch.tensor([[tokens[-1], *drafts]], device=device), drafted + 1)
            new = verifier.accept(drafts, drawn_from, step.choice, step.logits)
            states = step.states[:, : len(new)]
            cache.truncate(held + len(new))
        if accepted is not None:
            accepted.append((len(new) - 1, drafted))
        tokens += new


class Verifier:
    """How tokens are drawn and drafts are verified: greedily, or by the rejection rule that keeps the distribution."""

    def __init__(self, sampling: Sampling, generator: torch.Generator | None) -> None:
        self.sampling, self.generator = sampling, generator
        self.greedy = sampling.temperature == 0

    def pick(self, choice: Tensor, logits: Tensor) -> int:
        """Return one token of a step. choice: (1, 1); logits: (1, 1, vocab)."""
        return choice.item() if self.greedy else int(self.sampling.choose(logits[0], None, self.generator))

    def guess(self, choice: Tensor, logits: Tensor) -> tuple[int, Tensor | None]:
        """Return a draft, and the distribution (vocab,) that it was drawn from; None for greedy ones."""
        if self.greedy:
            return choice.item(), None
        q = self.sampling.probabilities(logits[0])
        return int(self._draw(q)), q[0]

    def accept(self, drafts: list[int], drawn_from: list[Tensor | None], choice: Tensor, logits: Tensor) -> list[int]:
        """Return the drafts up to the first that is rejected, and one token more.

        Sampling as in Leviathan et al. 2023, algorithm 1, and Chen et al. 2023: a draft x drawn from q is taken with
        probability min(1, p(x) / q(x)), else a token of (p - q)+, normalised, takes its place. So each token is one of
        p, the distribution of plain sampling. choice: (1, drafts + 1) likeliest tokens; logits: (1, drafts + 1, vocab).
        """
        if self.greedy:
            likeliest = choice[0].tolist()
            right = next((i for i, token in enumerate(drafts) if token != likeliest[i]), len(drafts))
            return likeliest[: right + 1]
        targets = self.sampling.probabilities(logits[0])
        for i, (token, q) in enumerate(zip(drafts, drawn_from, strict=True)):
            p = targets[i]
            if float(torch.rand((), generator=self.generator, device=p.device)) * float(q[token]) >= float(p[token]):
                rest = (p - q).clamp(min=0)
                return [*drafts[:i], int(self._draw(rest if rest.any() else p))]  # all 0 only by rounding
        return [*drafts, int(self._draw(targets[-1]))]

    def _draw(self, weights: Tensor) -> Tensor:
        return torch.multinomial(weights, 1, generator=self.generator)


class DraftChain:
    """The MTP layers as drafters, each with its own latent cache.

    With n tokens known, the main model has seen n-1. Depth k joins, for position t, the state of depth k-1 with token
    t+k, so its last k-1 positions rest on drafts: they are computed again once the tokens are known. For drafts beyond
    D the last depth continues from its own state and draft.
    """

    def __init__(self, runner: EagerRunner, verifier: Verifier, most: int) -> None:
        self.cache, self.runner, self.verifier, self.most = runner.cache, runner, verifier, most
        self.depths, self.layers = min(len(runner.model.mtp), most), runner.model.config.num_hidden_layers
        # For each depth the state of the depth before at the first position that must be computed again.
        self.carried: list[Tensor | None] = [None] * (self.depths + 1)

    def draft(self, states: Tensor, tokens: list[int]) -> tuple[list[int], list[Tensor | None]]:
        """Return tokens after `tokens`, and what they were drawn from; see `Verifier.guess`.

        states: (1, new, hidden) of the main model at the positions it has seen since.
        """
        known, line, carried, drawn_from, confidence = len(tokens), list(tokens), list(self.carried), [], 1.0
        for count in range(1, self.most + 1):
            depth = min(count, self.depths)
            start = self.cache.lengths[self.layers + depth - 1]
            if count > self.depths:  # the layer's own state, and the token that it drafted from it
                states = states[:, -1:]
            elif (doubtful := carried[depth - 1]) is not None:
                states = torch.cat((doubtful, states), dim=1)
            ids = torch.tensor([line[start + depth : start + depth + states.shape[1]]], device=states.device)
            step = self.runner.draft(states, ids, depth)
            states = step.states
            if count <= self.depths:
                # The next depth's first doubtful position is one before this one's.
                at = known - depth - 1 - start
                self.carried[depth] = states[:, at : at + 1] if at >= 0 else None
            token, q = self.verifier.guess(step.choice, step.logits)
            line.append(token)
            drawn_from.append(q)
            confidence *= step.confidence.item()
            if count >= self.depths and confidence < MIN_DRAFT_CONFIDENCE:
                break
        for depth in range(1, self.depths + 1):
            self.cache.truncate(max(known - depth, 0), self.layers + depth - 1)
        return line[known:], drawn_from
