"""Continuous batching: requests join and leave a running batch, so that none waits for the longest of the others.

Every sequence has a slot of a latent cache for as long as it runs. In each step the running ones get one token more in
one pass, those that end free their slots, and waiting ones take these. (Orca, Yu et al. 2022, section 3.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from model.cache import LatentCache, SlotCache, cache_dtype
from model.decoding import native
from model.decoding.prefill import TOKENS, prefill
from model.decoding.sampling import Sampling
from model.decoding.stepper import read
from model.transformer import MiniDeepSeek, logits

GREEDY = Sampling(temperature=0)
# CPU kernels are generated for each new shape (10 ms against 1 ms of work): prompts are padded to a multiple of this.
WIDTH = 8


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked for.

    Args:
        prompt: token ids, at least one.
        stop: tokens that end the completion, and belong to it.
        chances: numbers in [0, 1), one for each token that is sampled, of which the completion is then a function;
            drawn on torch's global generator when left out. Greedy requests need none.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[int, ...] = ()
    chances: Sequence[float] | None = None


@dataclass(eq=False)
class Completion:
    """What has become of a request so far.

    Attributes:
        log_probs: of the tokens, see `Sampling.choose_by_chance`.
        finish: stop, length, cancelled, or empty while there is more to come.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: str = ""


class Event(NamedTuple):
    """One more token of a completion; `finish` as there, after this token."""

    completion: Completion
    token: int
    log_prob: float
    finish: str


@dataclass
class _Prompt:
    """A prompt that requests wait with. It is read once: `latents` (layers, time, C) and (1, vocab) `logits`."""

    ids: tuple[int, ...]
    waiting: int = 0
    latents: Tensor | None = None
    logits: Tensor | None = None


class Batcher:
    """Completes many requests at once, each as if it were alone. Whoever drives it calls `step` while it is `busy`.

    The weights must not change in its life. It starts no threads, and is for one.

    Args:
        slots: most sequences that run at a time. max_length: most tokens of a prompt and its completion together.
        prefill_tokens: of prompts that are read in one pass, at least one prompt: a bound on how long running
            sequences wait for new ones.
    """

    def __init__(self, model: MiniDeepSeek, slots: int, max_length: int, prefill_tokens: int = TOKENS) -> None:
        self.model, self.slots, self.max_length, self.prefill_tokens = model, slots, max_length, prefill_tokens
        self.device = model.lm_head.weight.device
        self.cache = SlotCache(model.config, slots, max_length, cache_dtype(model), self.device)
        self.running: list[Completion] = []  # in the order of the cache's slots
        self.waiting: deque[Completion] = deque()
        self._prompts: dict[tuple[int, ...], _Prompt] = {}  # of those that wait, in their order

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.running or self.waiting)

    def submit(self, request: Request) -> Completion:
        """Queue a request. Requests with equal prompts that wait at the same time share the reading of it.

        Raises:
            ValueError: an empty prompt, no token to make, or more than `max_length`.
        """
        length = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1 or length > self.max_length:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones: at least one of "
                f"each, and at most {self.max_length} together"
            )
        if request.sampling.temperature > 0:
            given = torch.rand(request.max_new_tokens) if request.chances is None else request.chances
            chances = given.tolist() if isinstance(given, Tensor) else list(given)
            if len(chances) < request.max_new_tokens:
                raise ValueError(f"{len(chances)} chances for {request.max_new_tokens} tokens")
        else:
            chances = []
        ids = tuple(request.prompt)
        completion = Completion(Request(ids, request.max_new_tokens, request.sampling, request.stop, chances))
        self._prompts.setdefault(ids, _Prompt(ids)).waiting += 1
        self.waiting.append(completion)
        return completion

    def cancel(self, completion: Completion) -> None:
        """Give a request up; nothing happens when it is finished."""
        if completion.finish:
            return
        if completion in self.running:
            self._leave(self.running.index(completion))
        else:
            self.waiting.remove(completion)
            self._take_prompt(completion)
        completion.finish = "cancelled"

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token more for each sequence that runs or can begin now."""
        scores = [self._decode()] if self.running else []
        scores += self._admit()
        if not scores:
            return []
        tokens, log_probs = self._choose(torch.cat(scores) if len(scores) > 1 else scores[0])
        events = []
        for completion, token, log_prob in zip(self.running, tokens, log_probs, strict=True):
            completion.tokens.append(token)
            completion.log_probs.append(log_prob)
            if token in completion.request.stop:
                completion.finish = "stop"
            elif len(completion.tokens) == completion.request.max_new_tokens:
                completion.finish = "length"
            events.append(Event(completion, token, log_prob, completion.finish))
        # From the last on: what moves into a free place is then never finished itself.
        for row in reversed(range(len(self.running))):
            if self.running[row].finish:
                self._leave(row)
        return events

    def run(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Submit requests and complete them; yields them in their order, as early as that can be."""
        completions = [self.submit(request) for request in requests]
        for completion in completions:
            while not completion.finish:
                self.step()
            yield completion

    def _decode(self) -> Tensor:
        """The last tokens of all running sequences through the network. (running, vocab)"""
        last = [completion.tokens[-1] for completion in self.running]
        rows = self._rows(len(last))
        ids = torch.tensor(last + [0] * (rows - len(last)), device=self.device)
        self.cache.begin(rows, 1)
        if self._in_c(rows):
            return read(self.model, ids.unsqueeze(1), self.cache).logits[:, -1]
        hidden = self.model(ids.unsqueeze(1), cache=self.cache).hidden[:, -1]
        return logits(hidden, self.model.lm_head.weight)[: len(last)]

    def _in_c(self, rows: int) -> bool:
        """Whether decode.c takes a step of so many rows."""
        return self.device.type == "cpu" and rows <= native.MOST_TOKENS

    def _rows(self, count: int) -> int:
        """How many rows a pass over so many has: in PyTorch a power of two, so that shapes are few."""
        return count if self._in_c(count) else min(1 << (count - 1).bit_length(), self.slots)

    def _admit(self) -> list[Tensor]:
        """Give free slots to those who wait, in their order. Returns (1, vocab) logits of their first tokens."""
        scores = []
        while self.waiting and len(self.running) < self.slots:
            completion = self.waiting[0]
            while self._prompts[completion.request.prompt].latents is None:
                self._prefill()
            prompt = self._take_prompt(completion)
            self.cache.occupy(prompt.latents)
            self.running.append(self.waiting.popleft())
            scores.append(prompt.logits)
        return scores

    def _take_prompt(self, completion: Completion) -> _Prompt:
        """The prompt of a request that waits no longer; forgotten when it was the last."""
        prompt = self._prompts[completion.request.prompt]
        prompt.waiting -= 1
        if prompt.waiting == 0:
            del self._prompts[prompt.ids]
        return prompt

    def _prefill(self) -> None:
        """Read the next prompts, padded on the right, where causality hides the padding from them."""
        batch, width, real = [], 0, 0
        for prompt in self._prompts.values():
            if prompt.latents is not None:
                continue
            wider = max(width, -(-len(prompt.ids) // WIDTH) * WIDTH)
            tokens = wider * (len(batch) + 1)
            # Prompts of very different lengths are not read together: half of the pass would be padding.
            if batch and (tokens > self.prefill_tokens or tokens > 2 * (real + len(prompt.ids)) + 16 * WIDTH):
                break
            batch, width, real = [*batch, prompt], wider, real + len(prompt.ids)
        width = min(width, self.max_length)
        ids = torch.tensor([[*prompt.ids, *[0] * (width - len(prompt.ids))] for prompt in batch], device=self.device)
        cache = LatentCache(self.model.config, len(batch), width, self.cache.latents.dtype, self.device)
        last = torch.tensor([len(prompt.ids) - 1 for prompt in batch], device=self.device)
        scores = logits(prefill(self.model, ids, cache, last), self.model.lm_head.weight)
        for row, prompt in enumerate(batch):
            prompt.latents = cache.latents[:, row, : len(prompt.ids)]
            prompt.logits = scores[row : row + 1]

    def _choose(self, scores: Tensor) -> tuple[list[int], list[float]]:
        """The next token of each running sequence, (running, vocab), by its own rule, and its log-probability."""
        count = len(scores)
        ways: dict[Sampling, list[int]] = {}
        for row, completion in enumerate(self.running):
            ways.setdefault(completion.request.sampling, []).append(row)
        chosen = torch.empty(count, dtype=torch.int64, device=self.device)
        log_probs = torch.empty(count, device=self.device)
        for sampling, rows in ways.items():
            chances = [
                completion.request.chances[len(completion.tokens)] if sampling.temperature > 0 else 0.0
                for completion in (self.running[row] for row in rows)
            ]
            part = slice(None) if len(rows) == count else torch.tensor(rows, device=self.device)
            chosen[part], log_probs[part] = sampling.choose_by_chance(
                scores[part], self._seen(sampling, rows), torch.tensor(chances, device=self.device)
            )
        return chosen.tolist(), log_probs.tolist()

    def _seen(self, sampling: Sampling, rows: list[int]) -> Tensor | None:
        """(rows, time) the tokens before the next one, for the repetition penalty; short rows repeat their first."""
        if sampling.repetition_penalty == 1:
            return None
        seen = [[*self.running[row].request.prompt, *self.running[row].tokens] for row in rows]
        longest = max(map(len, seen))
        return torch.tensor([[*ids, *ids[:1] * (longest - len(ids))] for ids in seen], device=self.device)

    def _leave(self, row: int) -> None:
        """Free a running sequence's slot; the last one moves into its place, as in the cache."""
        self.cache.release(row)
        last = self.running.pop()
        if row < len(self.running):
            self.running[row] = last
