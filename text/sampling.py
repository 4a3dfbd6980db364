"""Samples of given size, spread evenly over data of any size, in one pass and in memory for the sample alone."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from text.order import scramble

Item = TypeVar("Item")


@dataclass
class Sample:
    """`texts` in the order of the corpus; sizes in UTF-8 bytes."""

    texts: list[str]
    size: int
    documents_seen: int
    size_seen: int


def sample_by_size(texts: Iterable[str], size: int, seed: int = 0) -> Sample:
    """Whole texts of together at most `size` bytes, or the beginning of one text if that is longer.

    Each text draws a number, and the texts below a bar are kept; the bar is lowered whenever they grow too large. So
    every text has the same chance wherever it stands, and equal corpora and seeds give equal samples.
    """
    draw = random.Random(seed).random
    bar = 1.0
    kept: list[tuple[float, int, str, int]] = []  # a heap with the highest draw first
    total = size_seen = number = 0
    for number, text in enumerate(texts, start=1):
        length = len(text.encode("utf-8", "surrogatepass"))
        size_seen += length
        drawn = draw()
        if drawn >= bar:
            continue
        if length > size:
            text = text.encode("utf-8", "surrogatepass")[:size].decode("utf-8", "ignore")
            length = size
        heapq.heappush(kept, (-drawn, number, text, length))
        total += length
        while total > size:
            highest, _, _, removed = heapq.heappop(kept)
            bar = -highest
            total -= removed
    kept.sort(key=lambda entry: entry[1])
    return Sample([entry[2] for entry in kept], total, number, size_seen)


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
