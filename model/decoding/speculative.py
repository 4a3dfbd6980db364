"""Speculative decoding: the MTP layers draft, one pass of the main model verifies (DeepSeek-V3 section 5.4.3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.cache import LatentCache, cache_dtype
from model.decoding.greedy_pass import greedy_pass
from model.decoding.sampling import GREEDY, Sampling
from model.decoding.stepper import draft, read
from model.transformer import MiniDeepSeek

MIN_DRAFT_CONFIDENCE = 0.4  # a draft is continued while all of it comes true with this probability, by its own estimate


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
) -> Iterator[int]:
    """The tokens of one prompt, greedy ones the same as plain decoding's, sampled ones of the same distribution.

    The main model reads the last token and its drafts at once. It keeps the drafts as far as they hold, and adds one
    token of its own.

    Args:
        input_ids: (1, time).
        accepted: receives of each pass how many drafts were kept, and how many there were.
        draft_tokens: the most drafts a pass; 0 means one for each MTP layer. Further ones chain the last layer on
            itself.
        sampling: without repetition penalty.
    """
    device, time, vocab = input_ids.device, input_ids.shape[1], model.lm_head.weight.shape[0]
    if not 0 <= input_ids.min() <= input_ids.max() < vocab:  # C would read beyond the embedding
        raise IndexError(f"a token that is not in the vocabulary of {vocab}")
    most = draft_tokens or len(model.mtp)
    cache = LatentCache(model.config, 1, time + max_new_tokens + most + 1, cache_dtype(model), device, mtp=True)
    verifier = Verifier(sampling, None if seed is None else torch.Generator(device).manual_seed(seed))
    chain = _DraftChain(model, cache, verifier, most)
    step = read(model, input_ids, cache)
    tokens = [*input_ids[0].tolist(), verifier.pick(step.choice, step.logits)]
    states, written = step.states, 0
    fast = greedy_pass(model, cache, tokens, states, most, MIN_DRAFT_CONFIDENCE) if verifier.greedy else None
    while max_new_tokens > 0:
        for token in tokens[time + written :]:
            written += 1
            yield token
            if token in stop or written == max_new_tokens:
                return
        if fast is not None:
            new, drafted = fast.run()
        else:
            drafts, probabilities = chain.draft(states, tokens)
            held, drafted = cache.length, len(drafts)
            step = read(model, torch.tensor([[tokens[-1], *drafts]], device=device), cache, drafted + 1)
            new = verifier.accept(drafts, probabilities, step.choice, step.logits)
            states = step.states[:, : len(new)]
            cache.truncate(held + len(new))
        if accepted is not None:
            accepted.append((len(new) - 1, drafted))
        tokens += new


class Verifier:
    """How tokens are drawn and drafts are judged: greedily, or by the rejection rule that keeps the distribution."""

    def __init__(self, sampling: Sampling, generator: torch.Generator | None) -> None:
        self.sampling, self.generator = sampling, generator
        self.greedy = sampling.temperature == 0

    def pick(self, choice: Tensor, logits: Tensor) -> int:
        """One token of a step. choice: (1, 1); logits: (1, 1, vocab)."""
        return choice.item() if self.greedy else int(self.sampling.choose(logits[0], None, self.generator))

    def guess(self, choice: Tensor, logits: Tensor) -> tuple[int, Tensor | None]:
        """A draft, and the distribution (vocab,) that it was drawn from; None for greedy ones."""
        if self.greedy:
            return choice.item(), None
        probabilities = self.sampling.probabilities(logits[0])
        return int(self._draw(probabilities)), probabilities[0]

    def accept(
        self, drafts: list[int], probabilities: list[Tensor | None], choice: Tensor, logits: Tensor
    ) -> list[int]:
        """The drafts up to the first that does not hold, and one token more.

        Sampling as in Leviathan et al. 2023, algorithm 1, and Chen et al. 2023: a draft x drawn from q is kept with
        probability min(1, p(x) / q(x)), else a token of (p - q)+, normalised, takes its place. So each token is one of
        p, the distribution of plain sampling, however bad the drafts are.

        Args:
            choice: (1, drafts + 1) likeliest tokens after each; logits: (1, drafts + 1, vocab).
        """
        if self.greedy:
            likeliest = choice[0].tolist()
            right = next((i for i, token in enumerate(drafts) if token != likeliest[i]), len(drafts))
            return likeliest[: right + 1]
        targets = self.sampling.probabilities(logits[0])
        for i, (token, q) in enumerate(zip(drafts, probabilities, strict=True)):
            p = targets[i]
            if float(torch.rand((), generator=self.generator, device=p.device)) * float(q[token]) >= float(p[token]):
                rest = (p - q).clamp(min=0)
                return [*drafts[:i], int(self._draw(rest if rest.any() else p))]  # all 0 only by rounding
        return [*drafts, int(self._draw(targets[-1]))]

    def _draw(self, weights: Tensor) -> Tensor:
        return torch.multinomial(weights, 1, generator=self.generator)


class _DraftChain:
    """The MTP layers as drafters, each with its own latent cache.

    With n tokens known, the main model has seen n-1 of them. Depth k joins, for position t, the state of depth k-1 with
    token t+k, so its last k-1 positions rest on drafts: they are computed anew once the tokens are known. The last
    depth may go on from its own state and draft, one position further each time, for drafts beyond D.
    """

    def __init__(self, model: MiniDeepSeek, cache: LatentCache, verifier: Verifier, most: int) -> None:
        self.model, self.cache, self.verifier, self.most = model, cache, verifier, most
        # For each depth the state of the depth before at the first position that must be computed anew.
        self.carried: list[Tensor | None] = [None] * (len(model.mtp) + 1)

    def draft(self, states: Tensor, tokens: list[int]) -> tuple[list[int], list[Tensor | None]]:
        """Tokens after `tokens`, and what they were drawn from; see `Verifier`.

        states: (1, new, hidden) of the main model at the positions it has seen since.
        """
        known, line, carried, probabilities, likely = len(tokens), list(tokens), list(self.carried), [], 1.0
        depths, first = min(len(self.model.mtp), self.most), self.model.config.num_hidden_layers - 1
        for count in range(1, self.most + 1):
            depth = min(count, depths)
            start = self.cache.lengths[first + depth]
            if count > depths:  # the layer's own state, and the token that it drafted from it
                states = states[:, -1:]
            elif (doubtful := carried[depth - 1]) is not None:
                states = torch.cat((doubtful, states), dim=1)
            ids = torch.tensor([line[start + depth : start + depth + states.shape[1]]], device=states.device)
            step = draft(self.model, states, ids, depth, self.cache)
            states = step.states
            if count <= depths:
                # The next depth's first doubtful position is one before this one's.
                at = known - depth - 1 - start
                self.carried[depth] = states[:, at : at + 1] if at >= 0 else None
            token, q = self.verifier.guess(step.choice, step.logits)
            line.append(token)
            probabilities.append(q)
            likely *= step.confidence.item()
            if count >= depths and likely < MIN_DRAFT_CONFIDENCE:
                break
        for depth in range(1, depths + 1):
            self.cache.truncate(max(known - depth, 0), first + depth)
        return line[known:], probabilities
