"""The order of requests: who waits, who runs, and which prompts are read together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.decoding.sampling import GREEDY, Sampling

# CPU kernels are generated for each new shape (10 ms against 1 ms of work): prompts are padded to a multiple of this.
WIDTH = 8


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked for.

    Args:
        prompt: token ids, at least one.
        stop: tokens that end the completion, and belong to it.
        uniforms: a number in [0, 1) for each token that is sampled; drawn on torch's global generator when left out.
        observe: called with the (vocab,) logits that each token is chosen from, before its event.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[int, ...] = ()
    uniforms: Sequence[float] | None = None
    observe: Callable[[Tensor], None] | None = None


@dataclass(eq=False)
class Completion:
    """What has become of a request so far.

    Attributes:
        log_probs: of the tokens, see `Sampling.choose_by_uniform`.
        finish: stop, length, cancelled, or empty while there is more to come.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: str = ""


@dataclass
class Prompt:
    """A prompt that requests wait with. It is read once: `latents` (layers, time, C) and (1, vocab) `logits`."""

    ids: tuple[int, ...]
    waiting: int = 0
    latents: Tensor | None = None
    logits: Tensor | None = None


class Scheduler:
    """Requests in the order of their coming; at most `slots` run at a time, `running` in the order of the cache's.

    Args:
        max_length: most tokens of a prompt and its completion together.
        prefill_tokens: most tokens of prompts read in one pass: a bound on how long running sequences wait.
    """

    def __init__(self, slots: int, max_length: int, prefill_tokens: int) -> None:
        self.slots, self.max_length, self.prefill_tokens = slots, max_length, prefill_tokens
        self.running: list[Completion] = []
        self.waiting: deque[Completion] = deque()
        self._prompts: dict[tuple[int, ...], Prompt] = {}  # of those that wait, in their order

    @property
    def can_start(self) -> bool:
        """Whether a request waits and a slot is free."""
        return bool(self.waiting) and len(self.running) < self.slots

    def submit(self, request: Request) -> Completion:
        """Queue a request. Raises `ValueError`: an empty prompt, no token to make, or more than `max_length`."""
        length = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1 or length > self.max_length:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones: at least one of "
                f"each, and at most {self.max_length} together"
            )
        uniforms = []
        if request.sampling.temperature > 0:
            given = torch.rand(request.max_new_tokens) if request.uniforms is None else request.uniforms
            uniforms = given.tolist() if isinstance(given, Tensor) else list(given)
            if len(uniforms) < request.max_new_tokens:
                raise ValueError(f"{len(uniforms)} uniforms for {request.max_new_tokens} tokens")
        ids = tuple(request.prompt)
        completion = Completion(replace(request, prompt=ids, uniforms=uniforms))
        self._prompts.setdefault(ids, Prompt(ids)).waiting += 1
        self.waiting.append(completion)
        return completion

    def next_prompt(self) -> Prompt:
        """Return the prompt of the first that waits."""
        return self._prompts[self.waiting[0].request.prompt]

    def unread(self) -> list[Prompt]:
        """Return the next prompts to read in one pass, of similar lengths: else half of the pass would be padding."""
        batch, width, tokens = [], 0, 0
        for prompt in self._prompts.values():
            if prompt.latents is not None:
                continue
            wider = max(width, padded_width(len(prompt.ids)))
            area = wider * (len(batch) + 1)
            if batch and (area > self.prefill_tokens or area > 2 * (tokens + len(prompt.ids)) + 16 * WIDTH):
                break
            batch, width, tokens = [*batch, prompt], wider, tokens + len(prompt.ids)
        return batch

    def start(self) -> None:
        """Let the first that waits run."""
        self._forget_prompt(self.waiting[0])
        self.running.append(self.waiting.popleft())

    def withdraw(self, completion: Completion) -> None:
        """Let a request wait no longer."""
        self.waiting.remove(completion)
        self._forget_prompt(completion)

    def finish(self, row: int) -> None:
        """Let a running request end; the last one moves into its place, as in the cache."""
        last = self.running.pop()
        if row < len(self.running):
            self.running[row] = last

    def _forget_prompt(self, completion: Completion) -> None:
        prompt = self._prompts[completion.request.prompt]
        prompt.waiting -= 1
        if prompt.waiting == 0:
            del self._prompts[prompt.ids]


def padded_width(length: int) -> int:
    """Round a prompt's length up to a multiple of `WIDTH`."""
    return -(-length // WIDTH) * WIDTH
