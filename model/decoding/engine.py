"""Continuous batching (Orca, Yu et al. 2022, section 3): requests join and leave a running batch.

Every sequence has a slot of a latent cache for as long as it runs. In each step the running ones get one token more in
one pass, those that end free their slots, and waiting ones take these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from model.cache import LatentCache, cache_dtype, send
from model.decoding.eager import PREFILL_TOKENS
from model.decoding.runner import runner_for
from model.decoding.sampling import Sampling
from model.decoding.scheduler import Completion, Prompt, Request, Scheduler, padded_width
from model.decoding.slot_cache import SlotCache

if TYPE_CHECKING:
    from model.transformer import MiniDeepSeek


class Event(NamedTuple):
    """One more token of a completion; `finish` as there, after this token."""

    completion: Completion
    token: int
    log_prob: float
    finish: str


class Engine:
    """Completes many requests at once, each as if it were alone. Whoever drives it calls `step` while it is `busy`.

    The weights must not change in its life. It starts no threads, and is for one.

    Args:
        slots: most sequences that run at a time. max_length: most tokens of a prompt and its completion together.
        prefill_tokens: see `Scheduler`.
    """

    def __init__(self, model: MiniDeepSeek, slots: int, max_length: int, prefill_tokens: int = PREFILL_TOKENS) -> None:
        self.model, self.device = model, model.lm_head.weight.device
        self.scheduler = Scheduler(slots, max_length, prefill_tokens)
        self.cache = SlotCache(model.config, slots, max_length, cache_dtype(model), self.device)
        self.runner = runner_for(model, self.cache)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def submit(self, request: Request) -> Completion:
        """Queue a request; see `Scheduler.submit`. Those with equal prompts that wait at once share its reading."""
        return self.scheduler.submit(request)

    def cancel(self, completion: Completion) -> None:
        """Give a request up; nothing happens when it is finished."""
        if completion.finish:
            return
        if completion in self.scheduler.running:
            self._release(self.scheduler.running.index(completion))
        else:
            self.scheduler.withdraw(completion)
        completion.finish = "cancelled"

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token more for each sequence that runs or can begin now."""
        running = self.scheduler.running
        logits = [self._decode()] if running else []
        logits += self._admit()
        if not logits:
            return []
        logits = torch.cat(logits) if len(logits) > 1 else logits[0]
        tokens, log_probs = self._choose(logits)
        events = []
        for row, (completion, token, log_prob) in enumerate(zip(running, tokens, log_probs, strict=True)):
            if completion.request.observe:
                completion.request.observe(logits[row])
            completion.tokens.append(token)
            completion.log_probs.append(log_prob)
            if token in completion.request.stop:
                completion.finish = "stop"
            elif len(completion.tokens) == completion.request.max_new_tokens:
                completion.finish = "length"
            events.append(Event(completion, token, log_prob, completion.finish))
        # From the last on: what moves into a free place is then never finished itself.
        for row in reversed(range(len(running))):
            if running[row].finish:
                self._release(row)
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
        last = [completion.tokens[-1] for completion in self.scheduler.running]
        rows = len(last)
        if rows > self.runner.any_rows:  # a power of two, so that shapes are few
            rows = min(1 << (rows - 1).bit_length(), self.scheduler.slots)
        ids = send(torch.tensor(last + [0] * (rows - len(last))), self.device)
        return self.runner.step(ids.unsqueeze(1)).logits[: len(last), -1]

    def _admit(self) -> list[Tensor]:
        """Give free slots to those who wait, in their order. Returns (1, vocab) logits of their first tokens."""
        logits = []
        while self.scheduler.can_start:
            prompt = self.scheduler.next_prompt()
            while prompt.latents is None:
                self._prefill(self.scheduler.unread())
            self.scheduler.start()
            self.cache.occupy(prompt.latents)
            logits.append(prompt.logits)
        return logits

    def _prefill(self, prompts: list[Prompt]) -> None:
        """Read prompts, padded on the right, where causality hides the padding from them."""
        lengths = [len(prompt.ids) for prompt in prompts]
        width = min(padded_width(max(lengths)), self.scheduler.max_length)
        ids = torch.tensor([[*prompt.ids, *[0] * (width - len(prompt.ids))] for prompt in prompts])
        cache = LatentCache(self.model.config, len(prompts), width, self.cache.latents.dtype, self.device)
        ids, last = send(ids, self.device), send(torch.tensor(lengths) - 1, self.device)
        logits = runner_for(self.model, cache).prefill(ids, last)
        for row, prompt in enumerate(prompts):
            prompt.latents = cache.latents[:, row, : len(prompt.ids)]
            prompt.logits = logits[row : row + 1]

    def _choose(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """The next token of each running sequence, (running, vocab), by its own rule, and its log-probability."""
        running, count = self.scheduler.running, len(logits)
        rows_of: dict[Sampling, list[int]] = {}
        for row, completion in enumerate(running):
            rows_of.setdefault(completion.request.sampling, []).append(row)
        chosen = torch.empty(count, dtype=torch.int64, device=self.device)
        log_probs = torch.empty(count, device=self.device)
        for sampling, rows in rows_of.items():
            some = [running[row] for row in rows]
            greedy = sampling.temperature == 0
            uniforms = [0.0 if greedy else made.request.uniforms[len(made.tokens)] for made in some]
            part = slice(None) if len(rows) == count else send(torch.tensor(rows), self.device)
            chosen[part], log_probs[part] = sampling.choose_by_uniform(
                logits[part], self._seen(sampling, some), send(torch.tensor(uniforms), self.device)
            )
        # The one wait for the device in a step; float64 holds every token's number.
        tokens, values = torch.stack((chosen.double(), log_probs.double())).tolist()
        return [int(token) for token in tokens], values

    def _seen(self, sampling: Sampling, some: list[Completion]) -> Tensor | None:
        """(rows, time) the tokens before the next one, for the repetition penalty; short rows repeat their first."""
        if sampling.repetition_penalty == 1:
            return None
        seen = [[*made.request.prompt, *made.tokens] for made in some]
        longest = max(map(len, seen))
        return send(torch.tensor([[*ids, *ids[:1] * (longest - len(ids))] for ids in seen]), self.device)

    def _release(self, row: int) -> None:
        """Free a running sequence's slot."""
        self.cache.release(row)
        self.scheduler.finish(row)
