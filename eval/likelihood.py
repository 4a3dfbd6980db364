"""Likelihoods and answers of a checkpoint from its latent cache: a beginning that several rows share is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from errors import UserError
from eval.answering import Answerer
from model.cache import LatentCache, cache_dtype
from model.decoding.sampling import GREEDY, Sampling
from model.ops import head_logits
from text.chats.chat_template import Message, encode_chat
from training.losses import IGNORE

AT_ONCE = 8192  # positions a forward pass
WIDTH = 16  # lengths are rounded up to it: CPU kernels are made for each new shape
SHARED = 32  # tokens that contexts must have in common for it to be worth reading them apart
LOGITS = 2**25  # numbers at once

Item = TypeVar("Item")
Pair = tuple[list[int], list[int]]
"""A context, and its continuation that is scored."""
Scored = tuple[float, bool]
"""A log-likelihood in nats, and whether it is that of the greedy continuation."""
Choices = tuple[list[int], list[list[int]]]
"""A context and its continuations."""


class CacheScorer:
    """Log-likelihoods and answers of a checkpoint. cut: contexts so far whose beginning had no room."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer, self.cut = answerer, 0
        self._chats: dict[str, list[int]] = {}  # ids of rendered conversations, whose turns are no longer to be seen

    @property
    def context(self) -> int:
        """Tokens that the model reads."""
        return self.answerer.model.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, or of a conversation that `render` made."""
        return self._chats.get(text) or self.answerer.tokenizer.encode(text)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text, up to where the next answer begins."""
        tokenizer = self.answerer.tokenizer
        ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        self._chats[text] = ids
        return text

    def encode_pair(self, context: str, continuation: str) -> Pair:
        """Context and continuation as ids: the pair is encoded as one text, and cut where the context alone ends.

        White space that ends the context belongs to the continuation: tokenizers join it with what follows.
        """
        if context in self._chats:
            return self._chats[context], self.encode(continuation)
        bare = context.rstrip()
        rest = context[len(bare) :] + continuation
        if not bare:
            return [self.answerer.tokenizer.bos_id], self.encode(rest)
        ids = self.encode(bare)
        # Where the texts join into the context's own last token, nothing would be left to score.
        return ids, self.encode(bare + rest)[len(ids) :] or self.encode(continuation)

    def score_pairs(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        """Yield the place and the score of each pair's continuation once it is known.

        Pairs in a row with one context are read together. A context that has no room loses its beginning. Raises
        `UserError` for a continuation that is longer than the model reads.
        """
        items: list[Choices] = []
        places: list[list[int]] = []
        for place, (context, continuation) in enumerate(pairs):
            if len(continuation) > self.context:
                raise UserError(f"a choice has {len(continuation)} tokens, the model reads {self.context}; drop it")
            if not items or items[-1][0] != context:
                items.append((context, []))
                places.append([])
            items[-1][1].append(continuation)
            places[-1].append(place)
        for number, (context, choices) in enumerate(items):
            room = self.context + 1 - max(map(len, choices))
            self.cut += len(context) > room
            items[number] = (context[-room:], choices)
        for number, scores in self._scores(items):
            yield from zip(places[number], scores, strict=True)

    def answers(
        self, prompts: Sequence[list[int]], max_new_tokens: int, sampling: Sampling = GREEDY, until: Sequence[str] = ()
    ) -> Iterator[tuple[int, str]]:
        """Yield the place and the answer of each prompt, up to its end or one of the texts `until`.

        A prompt that leaves no room for an answer has none. Raises `UserError` where no prompt would have room.
        """
        if max_new_tokens >= self.context:
            raise UserError(f"max_new_tokens {max_new_tokens}: the model reads {self.context} tokens in all; lower it")
        # An empty text has nothing to be continued: it follows the end of another.
        filled = [ids or [self.answerer.tokenizer.eos_id] for ids in prompts]
        fitting = [place for place, ids in enumerate(filled) if len(ids) + max_new_tokens <= self.context]
        made = self.answerer.completions([filled[place] for place in fitting], max_new_tokens, sampling)
        for place, text in zip(fitting, made, strict=True):
            yield place, min((text.partition(end)[0] for end in until), key=len, default=text)

    @torch.inference_mode()
    def score_windows(self, windows: Sequence[Pair]) -> list[float]:
        """Return the log-likelihood of each window's continuation, from whole rows: for long ones."""
        nats = [0.0] * len(windows)
        pad, device = self.answerer.tokenizer.pad_id, self.answerer.device
        for part in batches(windows, lambda window: len(window[0]) + len(window[1])):
            rows = [windows[place] for place in part]
            width = rounded(max(len(context) + len(scored) for context, scored in rows) - 1)
            inputs = padded([[*context, *scored[:-1]] for context, scored in rows], width, pad)
            labels = padded([[IGNORE] * (len(context) - 1) + scored for context, scored in rows], width, IGNORE)
            out = self.answerer.model(inputs.to(device))
            for place, (value, _) in zip(part, label_nats(out.hidden, out.head, labels.to(device)), strict=True):
                nats[place] = value
        return nats

    def _scores(self, items: Sequence[Choices]) -> Iterator[tuple[int, list[Scored]]]:
        """Yield (place, scores) of each item, in the order in which they are found.

        Continuations of one token, such as letters, need no more than the context; and what the contexts have in common
        from their beginning on, such as worked questions, is read once for all of them.
        """
        letters = [place for place, (_, choices) in enumerate(items) if all(len(choice) == 1 for choice in choices)]
        for shared, places in _same_beginnings({place: items[place][0] for place in letters}):
            for part in batches(places, lambda place, shared=shared: len(items[place][0]) - shared):
                chosen = [places[number] for number in part]
                log_probs = self._next_log_probs([items[place][0] for place in chosen], shared)
                for place, row, best in zip(chosen, log_probs, log_probs.argmax(-1).tolist(), strict=True):
                    ids = [choice[0] for choice in items[place][1]]
                    yield place, [(nats, ids[n] == best) for n, nats in enumerate(row[ids].double().tolist())]
        others = sorted(set(range(len(items))) - set(letters))
        for part in batches(others, lambda place: len(items[place][0]) + sum(map(len, items[place][1]))):
            scored = iter(self._continued([items[others[number]] for number in part]))
            for number in part:
                yield others[number], [next(scored) for _ in items[others[number]][1]]

    @torch.inference_mode()
    def _next_log_probs(self, contexts: Sequence[list[int]], shared: int) -> Tensor:
        """Return (contexts, vocab) float32 of the token after each context, whose first `shared` tokens are equal."""
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
        return head_logits(out.hidden[torch.arange(len(contexts), device=device), last], out.head).log_softmax(-1)

    @torch.inference_mode()
    def _continued(self, items: Sequence[Choices]) -> list[Scored]:
        """Score each continuation, in order: a context is read once, then each continuation has a row of the cache."""
        model, device, pad = self.answerer.model, self.answerer.device, self.answerer.tokenizer.pad_id
        contexts, choices = zip(*items, strict=True)
        flat = [choice for own in choices for choice in own]
        longest, rest = rounded(max(map(len, contexts))), rounded(max(map(len, flat)) - 1)
        padding = torch.tensor([longest - len(ids) for ids in contexts], device=device)
        padding, dtype = padding if padding.any() else None, cache_dtype(model)
        cache = LatentCache(model.config, len(contexts), longest + rest, dtype, device, padding)
        out = model(padded(contexts, longest, pad, left=True).to(device), cache=cache)
        rows = torch.tensor([row for row, own in enumerate(choices) for _ in own], device=device)
        first = torch.tensor([choice[0] for choice in flat], device=device)
        log_probs = head_logits(out.hidden[:, -1], out.head).log_softmax(-1)
        nats, greedy = log_probs[rows, first].double(), log_probs.argmax(-1)[rows] == first
        scores = list(zip(nats.tolist(), greedy.tolist(), strict=True))
        if rest:
            cache.keep_rows(rows)
            labels = padded([choice[1:] for choice in flat], rest, IGNORE).to(device)
            out = model(padded([choice[:-1] for choice in flat], rest, pad).to(device), cache=cache)
            more = label_nats(out.hidden, out.head, labels)
            scores = [(a + b, own and other) for (a, own), (b, other) in zip(scores, more, strict=True)]
        return scores


def label_nats(hidden: Tensor, head: Tensor, labels: Tensor) -> Iterator[Scored]:
    """Score the labels of each row, few rows at a time. hidden: (rows, time, hidden); labels: (rows, time)."""
    size = max(LOGITS // (labels.shape[1] * head.shape[0]), 1)
    for start in range(0, len(labels), size):
        log_probs = head_logits(hidden[start : start + size], head).log_softmax(-1)
        target = labels[start : start + size]
        counted = target != IGNORE
        nats = log_probs.gather(-1, target.clamp(min=0)[..., None])[..., 0].double().where(counted, 0.0).sum(1)
        greedy = ((log_probs.argmax(-1) == target) | ~counted).all(1)
        yield from zip(nats.tolist(), greedy.tolist(), strict=True)


def rolling(line: list[int], window: int, stride: int) -> Iterator[Pair]:
    """Yield windows over a line of ids whose first is given; each scores what those before it have not.

    A window reads at most `window` ids. The last one reaches back as far as it can.
    """
    scored = 1
    while scored < len(line):
        end = min(scored + (window if scored == 1 else stride), len(line))
        yield line[max(end - window - 1, 0) : scored], line[scored:end]
        scored = end


def batches(items: Sequence[Item], length: Callable[[Item], int]) -> Iterator[list[int]]:
    """Yield places of items of similar length, at most `AT_ONCE` positions together, the longest first."""
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
    """Return (rows, width) int64."""
    lines = ((row, [fill] * (width - len(row))) for row in rows)
    return torch.tensor([[*rest, *row] if left else [*row, *rest] for row, rest in lines])


def rounded(length: int) -> int:
    return -(-length // WIDTH) * WIDTH


def _same_beginnings(contexts: Mapping[int, list[int]]) -> Iterator[tuple[int, list[int]]]:
    """Yield (tokens that they share, places) of contexts that begin alike; each has a token of its own left."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, ids in contexts.items():
        groups.setdefault(tuple(ids[:SHARED]), []).append(place)
    for places in groups.values():
        own = min(len(contexts[place]) for place in places) - 1
        columns = zip(*(contexts[place][:own] for place in places), strict=True)
        shared = next((number for number, column in enumerate(columns) if len(set(column)) > 1), own)
        yield shared if len(places) > 1 and shared >= SHARED else 0, places
