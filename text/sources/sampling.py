"""A sample of rows, spread evenly over data of any size, in one pass and in memory for the sample alone."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import TypeVar

from text.order import scramble

Item = TypeVar("Item")


def sample_by_count(items: Iterable[Item], count: int, seed: int = 0) -> list[Item]:
    """`count` of the items, or all when there are fewer, in their order; each has the same chance.

    Taken are those whose seed and number scramble to the lowest values, so that what is added at the end of the data
    replaces few of them.
    """
    kept: list[tuple[int, int, Item]] = []  # a heap with the highest draw first
    for number, item in enumerate(items):
        entry = (-scramble(seed, number), number, item)
        if len(kept) < count:
            heapq.heappush(kept, entry)
        elif entry > kept[0]:
            heapq.heapreplace(kept, entry)
    return [item for _, _, item in sorted(kept, key=lambda entry: entry[1])]
