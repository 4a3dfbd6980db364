"""How a person or a scheduler stops a run, and what is shown of the work at hand."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

Item = TypeVar("Item")
# Ctrl-C reaches every process of a terminal, and torchrun sends its workers the signal once more: one request.
TOGETHER = 2.0  # seconds


class Stopped(Exception):
    """A signal asked the run to stop: all ranks leave the step that they are in together, as if it had not begun."""


@dataclass
class Watch:
    """Attributes: asked: a signal came. show: takes what is being done now, how much is done, and how much there is.

    Such as "validating", 3, 32, or "", 0, 0 where it is a step.
    """

    asked: bool = False
    show: Callable[[str, float, int], None] = lambda what, done, total: None

    def track(
        self, items: Iterable[Item], what: str, total: int, stops: Callable[[], bool] | None = None
    ) -> Iterator[Item]:
        """Yield the items, `total` in number, and show how many are done; no more than the first once a signal came.

        stops: whether one came, where that is not for this process alone to say.
        """
        for done, item in enumerate(items):
            if done and (self.asked if stops is None else stops()):
                break
            self.show(what, done, total)
            yield item
        self.show("", 0, 0)

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """Meanwhile the first SIGINT or SIGTERM asks to stop; a later one stops at once."""
        first = 0.0

        def arrive(number: int, frame: FrameType | None) -> None:
            nonlocal first
            if not self.asked:
                first, self.asked = time.monotonic(), True
                say("stopping at the next micro-batch, then saving (again to stop at once)")
            elif time.monotonic() - first > TOGETHER:
                raise KeyboardInterrupt

        before = {name: signal.signal(name, arrive) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


def aftermath() -> str:
    """Explain what torchrun says once its workers have ended by a signal; nothing without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return " (should a SignalException follow, it is torchrun's report of the signal, not a fault)"
