"""Encoded conversations into rows of one length: where to cut, what to put together, and how a row is written.

A conversation of n tokens fills n - 1 positions of a row: its last token is only ever predicted, never read.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np

from text.batches import IGNORED_LABEL, PADDING_SEGMENT
from text.order import BLOCK, block_shares, mixed


def cut_at_turn(mask: Sequence[int], sequence_length: int) -> int:
    """How many leading tokens of a conversation to keep: all turns up to the last answer that fits whole; 0 for none.

    mask: (tokens,), 1 where a token is learnt, so each run of ones is one answer with its end token. What follows the
    last answer teaches nothing and is cut as well.
    """
    learnt = np.asarray(mask, dtype=np.int8)
    ends = np.flatnonzero(np.diff(learnt, append=0) == -1) + 1
    fitting = ends[ends <= sequence_length + 1]
    return int(fitting[-1]) if len(fitting) else 0


def pack_best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to at most `capacity`: best-fit decreasing.

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


class PackedEpochs:
    """Which samples stand in which row: each epoch shuffles them by (seed, epoch), packs them and shuffles the rows."""

    def __init__(
        self,
        members: np.ndarray,
        positions: Callable[[np.ndarray], np.ndarray],
        capacity: int,
        seed: int,
        packing: bool,
        reach: int = 0,
    ) -> None:
        """members: (samples,) numbers; positions: how many positions of a row such numbers fill.

        `packing=False` gives each sample its own row. reach: how many rows apart those may be that are asked for
        together, beside a batch of consecutive ones.
        """
        self.members, self.capacity = members, capacity
        self._positions, self._seed, self._packing = positions, seed, packing
        self._epochs: dict[int, list[np.ndarray]] = {}
        self._kept = 2
        self._length = len(self._rows(0))
        self._kept = 2 + reach // self._length

    def __len__(self) -> int:
        """Rows in an epoch; the same in each, as best-fit's number of rows depends on the lengths alone."""
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        """The numbers of the samples in a row, counted from the first epoch on."""
        epoch, place = divmod(int(index), len(self))
        return self._rows(epoch)[place]

    def filled(self) -> float:
        """The share of positions that hold samples rather than padding."""
        return float(self._positions(self.members).sum() / (len(self) * self.capacity))

    def _rows(self, epoch: int) -> list[np.ndarray]:
        """All rows of an epoch. The epochs around it are kept too, as far as the next rows may be from these."""
        if epoch not in self._epochs:
            random = np.random.default_rng([self._seed, epoch])
            members = random.permutation(self.members)
            if self._packing:
                rows = [members[row] for row in pack_best_fit(self._positions(members), self.capacity)]
            else:
                rows = list(members[:, None])
            self._epochs[epoch] = [rows[place] for place in random.permutation(len(rows))]
            nearest = sorted(self._epochs, key=lambda other: abs(other - epoch))[: self._kept]
            self._epochs = {kept: self._epochs[kept] for kept in nearest}
        return self._epochs[epoch]


class MixedEpochs:
    """The packed rows of several sources, mixed by weight to 1/4096: each goes through its own epochs at its own pace.

    A row holds samples of one source. Without weights all samples are of one source, and an epoch shows each once.
    """

    def __init__(
        self,
        members: np.ndarray,
        owners: np.ndarray,
        weights: Sequence[float] | None,
        positions: Callable[[np.ndarray], np.ndarray],
        capacity: int,
        seed: int,
        packing: bool = True,
    ) -> None:
        """As `PackedEpochs`; owners: (members,) the source of each. Raises `ValueError` for one without a member."""
        self.members, self.capacity, self._seed = members, capacity, seed
        self._positions = positions
        self.shares = block_shares(weights) if weights and len(weights) > 1 else [BLOCK]
        if len(self.shares) == 1:
            owners = np.zeros_like(members)
        parts = [members[owners == owner] for owner in range(len(self.shares))]
        empty = [owner for owner, part in enumerate(parts) if not len(part)]
        if empty:
            raise ValueError(f"source {empty[0]} has no sample")
        reach = BLOCK if len(parts) > 1 else 0
        self._parts = [PackedEpochs(part, positions, capacity, seed, packing, reach) for part in parts]

    def __len__(self) -> int:
        """Rows of an epoch of every source."""
        return sum(map(len, self._parts))

    def __getitem__(self, index: int) -> np.ndarray:
        """The numbers of the samples in a row, counted from the start of training."""
        if len(self._parts) == 1:
            return self._parts[0][index]
        source, number = mixed(int(index), self.shares, self._seed)
        return self._parts[source][number]

    def filled(self) -> float:
        """The share of positions that hold samples rather than padding, over an epoch of every source."""
        return float(self._positions(self.members).sum() / (len(self) * self.capacity))


def write_row(conversations: Sequence[tuple[np.ndarray, np.ndarray]], sequence_length: int, pad_id: int) -> dict:
    """One row of a batch: input_ids, labels, segment_ids and position_ids, each (sequence_length,) int64.

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
