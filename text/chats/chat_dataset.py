"""Conversations in packed rows for fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from text.chats.encoded_chats import EncodedChats
from text.chats.packing import write_row
from text.sources.registry import Source
from text.tokenizer import Tokenizer


class ChatDataset:
    """Conversations for fine-tuning, packed into rows in which none sees another.

    Sample i is the same on every machine: epoch i // len(self) shuffles the conversations by (seed, epoch), packs
    them anew and shuffles the rows. `report` counts what was read, cut and skipped; `validation` is the held-out part
    as a data set of its own, or None.

    Sources with weights are mixed by them, to 1/4096 of the rows: each goes through its own epochs at its own pace, and
    `len` is the rows of all. What is held out is shown once, weights aside.
    """

    def __init__(
        self,
        sources: Sequence[Source | str | Path],
        tokenizer: Tokenizer,
        sequence_length: int,
        seed: int = 0,
        on_error: str = "skip",
        packing: bool = True,
        val_fraction: float = 0.0,
        progress: bool = True,
    ) -> None:
        """Read and encode the sources, files or folders; `packing=False` gives each conversation its own row.

        Raises `UserError` for a file that cannot be read and when there is nothing to learn.
        """
        self.sequence_length, self.seed, self.packing = sequence_length, seed, packing
        self.chats = EncodedChats.read(sources, tokenizer, sequence_length, on_error, progress)
        self.report = self.chats.report
        self.pad_id = tokenizer.pad_id
        train, held = self.chats.split(val_fraction)
        self._rows = self.chats.packed(train, sequence_length, seed, packing)
        self.validation: ChatDataset | None = None
        if len(held):
            self.validation = copy.copy(self)
            self.validation._rows = self.chats.plain(held, sequence_length, seed, packing)

    @property
    def identity(self) -> str:
        """What the order of the samples depends on beside the seed."""
        return self.chats.identity(self._rows)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self._rows)

    @property
    def tokens_per_epoch(self) -> int:
        """Positions of `len` samples, padding included."""
        return len(self) * self.sequence_length

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """input_ids, labels, segment_ids, position_ids of the samples, each (len(indices), sequence_length) int64."""
        rows = []
        for index in indices:
            conversations = [self.chats[member] for member in self._rows[index]]
            rows.append(write_row(conversations, self.sequence_length, self.pad_id))
        return stacked(rows)

    def members(self, index: int) -> np.ndarray:
        """The conversations of a row, as numbers in `chats`, in the order in which they stand in it."""
        return self._rows[index]

    def describe(self, index: int) -> str:
        """Where the conversations of a row come from."""
        return self.chats.describe(self.members(index))

    def filled(self) -> float:
        """The share of positions that hold conversations rather than padding."""
        return self._rows.filled()

    def print_summary(self) -> None:
        """What was read and what the rows look like, on one screen."""
        held = len(self.validation._rows.members) if self.validation else 0
        packed = f"packed into {len(self)} rows of {self.sequence_length} tokens, {self.filled():.1%} filled"
        packed += f", and {len(self.validation)} of what is held out" if self.validation else ""
        print("\n".join([*self.report.lines(), self.report.balance(len(self._rows.members), held), packed]))


def stacked(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Rows of one shape as a batch, (rows, ...) each."""
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
