"""Encoded conversations into rows of one length: where to cut, what to put together, and how a row is written.

A conversation of n tokens fills n - 1 positions of a row: its last token is only ever predicted, never read.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from text.order import IGNORED_LABEL, PADDING_SEGMENT


def cut_at_turn(mask: Sequence[int], sequence_length: int) -> int:
    """Return how many leading tokens to keep: all turns up to the last answer that fits whole; 0 for none.

    mask: (tokens,), 1 where a token is trained on, so each run of ones is one answer with its end token. What follows
    the last answer teaches nothing and is cut as well.
    """
    marks = bytes(mask[: sequence_length + 2])  # with the first token that does not fit, which may end an answer
    whole = len(marks) <= sequence_length + 1 and marks.endswith(b"\1")
    return len(marks) if whole else marks.rfind(b"\1\0") + 1


def pack_best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Return rows of indices whose lengths add up to at most `capacity`: best-fit decreasing.

    The longest go first, each into the fullest row that has room. Which lengths share a row depends on the lengths
    alone; of equal lengths the earlier index comes first. So another order of the same conversations gives the same
    number of rows with other conversations in them. Raises `ValueError` if one is longer than `capacity`.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"length {lengths.max()} is over the capacity {capacity}")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # row numbers by free positions
    rooms: list[int] = []  # the free positions that some row has, sorted
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, free = len(rows), capacity
            rows.append([])
        else:
            free = rooms[place]
            row = with_room[free].pop()
            if not with_room[free]:
                rooms.pop(place)
        rows[row].append(index)
        free -= length
        if not with_room[free]:
            insort(rooms, free)
        with_room[free].append(row)
    return rows


def write_row(conversations: Sequence[tuple[np.ndarray, np.ndarray]], sequence_length: int, pad_id: int) -> dict:
    """Return a row of a batch: input_ids, labels, segment_ids and position_ids, each (sequence_length,) int64.

    conversations: (ids, mask) pairs. labels[t] is the token that position t must predict, or -100. Each conversation
    is a segment 0, 1, ... whose positions start at 0. The padding behind them is segment -1, which the routers do not
    count, and has no labels.
    """
    row = {
        "input_ids": np.full(sequence_length, pad_id, dtype=np.int64),
        "labels": np.full(sequence_length, IGNORED_LABEL, dtype=np.int64),
        "segment_ids": np.full(sequence_length, PADDING_SEGMENT, dtype=np.int64),
        "position_ids": np.zeros(sequence_length, dtype=np.int64),
    }
    begin = 0
    for segment, (ids, mask) in enumerate(conversations):
        end = begin + len(ids) - 1
        row["input_ids"][begin:end] = ids[:-1]
        row["labels"][begin:end] = np.where(mask[1:], ids[1:].astype(np.int64), IGNORED_LABEL)
        row["segment_ids"][begin:end] = segment
        row["position_ids"][begin:end] = np.arange(end - begin)
        begin = end
    row["position_ids"][begin:] = np.arange(sequence_length - begin)
    return row
