"""What a process is busy with, and whether it was asked to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


class Stopped(Exception):
    """A signal asked the run to stop: all ranks leave the step that they are in together, as if it had not begun."""


@dataclass
class Watch:
    """Attributes: asked: a signal came. show: takes what is being done now, such as "validating 3/32"; "": a step."""

    asked: bool = False
    show: Callable[[str], None] = lambda _: None

    def track(self, items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
        """Yield the items, `total` in number, and show how many are done; no more of them once a signal came."""
        for done, item in enumerate(items):
            if self.asked:
                break
            self.show(f"{what} {done + 1}/{total}")
            yield item
        self.show("")
