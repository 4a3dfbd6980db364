"""Likelihoods and answers of a checkpoint from its latent cache: a beginning that several rows share is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from errors import UserError
from eval.answering import Answerer
from model.cache import LatentCache, cache_dtype
from model.transformer import logits

AT_ONCE = 8192  # positions a forward pass
WIDTH = 16  # lengths are rounded up to it: CPU kernels are made for each new shape
SHARED = 32  # tokens that contexts must have in common for it to be worth reading them apart
LOGITS = 2**26  # numbers at once
IGNORE = -100

Item = TypeVar("Item")
Scored = tuple[float, bool]
"""A log-likelihood in nats, and whether it is that of the greedy continuation."""
Choices = tuple[list[int], list[list[int]]]
"""A context and its continuations."""
Window = tuple[list[int], int]
"""Ids, and the place, at least 1, from which on they are scored."""


class CacheScorer:
    """Log-likelihoods of a checkpoint.

    Attributes: cut: contexts so far whose beginning had no room.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.answerer, self.cut = answerer, 0

    @property
    def context(self) -> int:
        """Tokens that the model reads."""
        return self.answerer.model.config.max_position_embeddings

    def score_pairs(
        self, pairs: Sequence[tuple[list[int], list[int]]], done: Callable[[int, Scored], None] = lambda *_: None
    ) -> list[Scored]:
        """Score the continuation of each (context, continuation); pairs in a row with one context are read together.

        done: called with the place and the score of a pair once it is known. Raises `UserError` for a continuation
        that is longer than the model reads. A context that has no room loses its beginning.
        """
        items: list[Choices] = []
        places: list[list[int]] = []
        for place, (context, continuation) in enumerate(pairs):
            if len(continuation) > self.context:
                raise UserError(
                    f"a choice or text of {len(continuation)} tokens, the model reads {self.context}; drop it"
                )
            if not items or items[-1][0] != context:
                items.append((context, []))
                places.append([])
            items[-1][1].append(continuation)
            places[-1].append(place)
        fitting = []
        for context, choices in items:
            room = self.context + 1 - max(map(len, choices))
            self.cut += len(context) > room
            fitting.append((context[-room:], choices))
        found: list[Scored] = [(0.0, False)] * len(pairs)
        for number, scores in self._scores(fitting):
            for place, score in zip(places[number], scores, strict=True):
                found[place] = score
                done(place, score)
        return found

    @torch.inference_mode()
    def score_windows(self, windows: Sequence[Window]) -> list[float]:
        """The log-likelihood of the ids that each window scores."""
        nats = [0.0] * len(windows)
        pad, device = self.answerer.tokenizer.pad_id, self.answerer.device
        for part in batches(windows, lambda window: len(window[0])):
            rows = [windows[place] for place in part]
            width = rounded(max(len(ids) for ids, _ in rows) - 1)
            out = self.answerer.model(padded([ids[:-1] for ids, _ in rows], width, pad).to(device))
            labels = padded([[IGNORE] * (scored - 1) + ids[scored:] for ids, scored in rows], width, IGNORE).to(device)
            for place, (value, _) in zip(part, label_nats(out.hidden, out.head, labels), strict=True):
                nats[place] = value
        return nats

    def _scores(self, items: Sequence[Choices]) -> Iterator[tuple[int, list[Scored]]]:
        """(place, scores) of each item, in the order in which they are found.

        Continuations of one token, such as letters, need no more than the context; and what the contexts have in common
        from their beginning on, such as worked questions, is read once for all of them.
        """
        letters = [place for place, (_, choices) in enumerate(items) if all(len(choice) == 1 for choice in choices)]
        for shared, places in _same_beginnings([(place, items[place][0]) for place in letters]):
            for part in batches(places, lambda place, shared=shared: len(items[place][0]) - shared):
                chosen = [places[number] for number in part]
                log_probs = self._next_log_probs([items[place][0] for place in chosen], shared)
                best = log_probs.argmax(-1).tolist()
                for place, row, greedy in zip(chosen, log_probs, best, strict=True):
                    ids = [choice[0] for choice in items[place][1]]
                    nats = row[ids].double().tolist()
                    yield place, [(value, token == greedy) for value, token in zip(nats, ids, strict=True)]
        others = sorted(set(range(len(items))) - set(letters))
        for part in batches(others, lambda place: len(items[place][0]) + sum(map(len, items[place][1]))):
            chosen = [others[number] for number in part]
            scored = iter(self._continued([items[place] for place in chosen]))
            for place in chosen:
                yield place, [next(scored) for _ in items[place][1]]

    @torch.inference_mode()
    def _next_log_probs(self, contexts: Sequence[list[int]], shared: int) -> Tensor:
        """(contexts, vocab) float32 of the token after each context; the first `shared` tokens are the same in all."""
        model, device, pad = self.answerer.model, self.answerer.device, self.answerer.tokenizer.pad_id
        width = rounded(max(map(len, contexts)) - shared)
        cache = None
        if shared:
            cache = LatentCache(model.config, 1, shared + width, cache_dtype(model), device)
            model(torch.tensor([contexts[0][:shared]], device=device), cache=cache)
            cache.keep_rows(torch.zeros(len(contexts), dtype=torch.long, device=device))
        # Padding is on the right, where no earlier position sees it.
        out = model(padded([ids[shared:] for ids in contexts], width, pad).to(device), cache=cache)
        last = torch.tensor([len(ids) - shared - 1 for ids in contexts], device=device)
        return logits(out.hidden[torch.arange(len(contexts), device=device), last], out.head).log_softmax(-1)

    @torch.inference_mode()
    def _continued(self, items: Sequence[Choices]) -> list[Scored]:
        """Each continuation of all contexts, in order: a context is read once, then each has a row of the cache."""
        model, device, pad = self.answerer.model, self.answerer.device, self.answerer.tokenizer.pad_id
        contexts, choices = zip(*items, strict=True)
        flat = [choice for own in choices for choice in own]
        longest, rest = rounded(max(map(len, contexts))), rounded(max(map(len, flat)) - 1)
        padding = torch.tensor([longest - len(ids) for ids in contexts], device=device)
        cache = LatentCache(
            model.config, len(contexts), longest + rest, cache_dtype(model), device, padding if padding.any() else None
        )
        out = model(padded(contexts, longest, pad, left=True).to(device), cache=cache)
        rows = torch.arange(len(contexts), device=device).repeat_interleave(
            torch.tensor([len(own) for own in choices], device=device)
        )
        first = torch.tensor([choice[0] for choice in flat], device=device)
        log_probs = logits(out.hidden[:, -1], out.head).log_softmax(-1)
        nats, greedy = log_probs[rows, first].double(), log_probs.argmax(-1)[rows] == first
        scores = list(zip(nats.tolist(), greedy.tolist(), strict=True))
        if rest:
            cache.keep_rows(rows)
            out = model(padded([choice[:-1] for choice in flat], rest, pad).to(device), cache=cache)
            more = label_nats(out.hidden, out.head, padded([choice[1:] for choice in flat], rest, IGNORE).to(device))
            scores = [(a + b, own and other) for (a, own), (b, other) in zip(scores, more, strict=True)]
        return scores


def label_nats(hidden: Tensor, head: Tensor, labels: Tensor) -> Iterator[Scored]:
    """Score the labels of each row, few rows at a time. hidden: (rows, time, hidden); labels: (rows, time)."""
    size = max(LOGITS // (labels.shape[1] * head.shape[0]), 1)
    for start in range(0, len(labels), size):
        log_probs = logits(hidden[start : start + size], head).log_softmax(-1)
        wanted = labels[start : start + size]
        counted = wanted != IGNORE
        nats = log_probs.gather(-1, wanted.clamp(min=0)[..., None])[..., 0].double().where(counted, 0.0).sum(1)
        greedy = ((log_probs.argmax(-1) == wanted) | ~counted).all(1)
        yield from zip(nats.tolist(), greedy.tolist(), strict=True)


def rolling(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first, scored, end) of the windows over a line of ids whose first is given: ids[scored:end] are scored in each.

    A window reads at most `window` ids. The last one reaches back as far as it can.
    """
    scored = 1
    while scored < length:
        end = min(scored + (window if scored == 1 else stride), length)
        yield max(end - window - 1, 0), scored, end
        scored = end


def batches(items: Sequence[Item], length: Callable[[Item], int]) -> Iterator[list[int]]:
    """Places of items of similar length, at most `AT_ONCE` positions together, the longest first."""
    part: list[int] = []
    widest = 0
    for place in sorted(range(len(items)), key=lambda place: -length(items[place])):
        widest = widest or length(items[place])
        if part and widest * (len(part) + 1) > AT_ONCE:
            yield part
            part, widest = [], length(items[place])
        part.append(place)
    if part:
        yield part


def padded(rows: Iterable[Sequence[int]], width: int, fill: int, left: bool = False) -> Tensor:
    """(rows, width) int64."""
    lines = [[fill] * (width - len(row)) + list(row) if left else [*row, *[fill] * (width - len(row))] for row in rows]
    return torch.tensor(lines)


def rounded(length: int) -> int:
    return -(-length // WIDTH) * WIDTH


def _same_beginnings(contexts: Sequence[tuple[int, list[int]]]) -> Iterator[tuple[int, list[int]]]:
    """(tokens that they share, places) of contexts that begin alike; each has a token of its own left.

    contexts: (place, ids).
    """
    groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for place, ids in contexts:
        groups.setdefault(tuple(ids[:SHARED]), []).append((place, ids))
    for group in groups.values():
        own = min(len(ids) for _, ids in group) - 1
        columns = zip(*(ids[:own] for _, ids in group), strict=True)
        shared = next((place for place, column in enumerate(columns) if len(set(column)) > 1), own)
        yield shared if len(group) > 1 and shared >= SHARED else 0, [place for place, _ in group]
