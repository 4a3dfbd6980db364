"""How a person or a scheduler stops a run."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

from training.parallel.ranks import Ranks

# Ctrl-C reaches every process of a terminal, and torchrun sends its workers the signal once more: one request.
TOGETHER = 2.0


class Interrupt:
    """While entered, the first SIGINT or SIGTERM asks the ranks' watch to stop; a later one stops at once."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._first = 0.0

    @property
    def asked(self) -> bool:
        return self._ranks.watch.asked

    def __enter__(self) -> Interrupt:
        self._previous = {name: signal.signal(name, self._arrive) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self._first = time.monotonic()
            self._ranks.watch.asked = True
            self._ranks.say("stopping at the next micro-batch, then saving (again to stop at once)")
        elif time.monotonic() - self._first > TOGETHER:
            raise KeyboardInterrupt


def aftermath() -> str:
    """What torchrun says once its workers have ended by a signal, explained; nothing without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return " (should a SignalException follow, it is torchrun's report of the signal, not a fault)"
