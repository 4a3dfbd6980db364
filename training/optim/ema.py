"""The exponential moving average of the weights, on the host (DeepSeek-V3 section 3.2.2)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from training.parallel.sharding import Shards

MARK = "ema|"  # before the names of its tensors in a checkpoint


class ExponentialMovingAverage:
    """m <- d m + (1 - d) w after each step, in float32, for every weight; training itself does not see it.

    On CUDA a step only starts a copy; a thread adds it while the next step computes.
    """

    def __init__(self, model: nn.Module, decay: float, shards: Shards | None = None) -> None:
        """Begin with the weights as they are. shards: of the weights, where this rank has no more."""
        self.decay = decay
        self._adding: Future[None] | None = None
        self._weights = {name: p.detach() for name, p in (shards or model).named_parameters()}
        self.means = {name: w.to("cpu", torch.float32, copy=True) for name, w in self._weights.items()}
        on_cuda = any(w.is_cuda for w in self._weights.values())
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "ema") if on_cuda else None
        self._staged = {name: torch.empty_like(mean).pin_memory() for name, mean in self.means.items() if on_cuda}

    def update(self) -> None:
        """Take a step's weights in."""
        if self._thread is None:
            self._add(self._weights)
            return
        self.wait()
        for name, staged in self._staged.items():  # before the next step changes them: the device works in this order
            staged.copy_(self._weights[name], non_blocking=True)
        (copied := torch.cuda.Event()).record()

        def add() -> None:
            copied.synchronize()
            self._add(self._staged)

        self._adding = self._thread.submit(add)

    def _add(self, weights: dict[str, Tensor]) -> None:
        means = list(self.means.values())
        torch._foreach_lerp_(means, [weights[name].float() for name in self.means], 1 - self.decay)

    def wait(self) -> None:
        """Until all weights that were taken in are part of the mean."""
        if self._adding is not None:
            self._adding.result()
            self._adding = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the model compute with the mean, meanwhile; then with its weights as they were, to the bit."""
        self.wait()
        kept = {name: w.to("cpu", copy=True) for name, w in self._weights.items()}
        try:
            self._put(self.means)
            yield
        finally:
            self._put(kept)

    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, w in self._weights.items():
            w.copy_(tensors[name])

    def state(self) -> dict[str, Tensor]:
        """Return the means by name, for a checkpoint: whole ones, or this rank's share of each."""
        self.wait()
        return {f"{MARK}{name}": mean for name, mean in self.means.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`; where a run has begun without, the mean begins with the weights of its checkpoint."""
        found = {name.removeprefix(MARK): mean for name, mean in state.items() if name.startswith(MARK)}
        for name, mean in self.means.items():
            mean.copy_(found.get(name, self._weights[name]))
