"""How a person or a scheduler stops a run."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from training.ranks import Ranks


class Interrupt:
    """While entered, the first SIGINT or SIGTERM sets `asked`, for the loop to see; a second one stops at once."""

    def __init__(self, ranks: Ranks) -> None:
        self.asked = False
        self._ranks = ranks

    def __enter__(self) -> Interrupt:
        self._previous = {name: signal.signal(name, self._arrive) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._ranks.say("stopping after this step (again to stop at once)")
