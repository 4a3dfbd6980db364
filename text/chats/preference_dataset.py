"""Pairs of answers in packed rows for preference learning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from text.chats.chat_dataset import stacked
from text.chats.encoded_pairs import EncodedPairs
from text.chats.packing import MixedEpochs, write_row
from text.sources.registry import Source
from text.tokenizer import Tokenizer


class PreferenceDataset:
    """Pairs of answers to one prompt, packed into rows in which no conversation sees another.

    A row has room for two conversations of `sequence_length`, so that both sides of a pair are always in one row: its
    segments 2k and 2k + 1 are the chosen and the rejected conversation of its k-th pair. Labels are the last answer
    and the token that ends it. Order, mixture, `report` and `validation` are as in `ChatDataset`.
    """

    def __init__(
        self,
        sources: Sequence[Source | str | Path],
        tokenizer: Tokenizer,
        sequence_length: int,
        seed: int = 0,
        on_error: str = "skip",
        val_fraction: float = 0.0,
        cut: bool = True,
    ) -> None:
        """Read and encode the pairs; `cut` as in `EncodedPairs.read`.

        Raises `UserError` for a file that cannot be read and when there is nothing to learn."""
        self.pairs = EncodedPairs.read(sources, tokenizer, sequence_length, on_error, cut)
        self.report, self.sequence_length = self.pairs.report, 2 * sequence_length
        self._reference: np.ndarray | None = None
        self._pad_id, self._seed = tokenizer.pad_id, seed
        train, held = self.pairs.split(val_fraction)
        self._rows = self.pairs.packed(train, self.sequence_length, seed)
        self.validation: PreferenceDataset | None = None
        if len(held):
            self.validation = self._with(self.pairs.plain(held, self.sequence_length, seed))

    def _with(self, rows: MixedEpochs) -> PreferenceDataset:
        part = copy.copy(self)
        part._rows, part.validation = rows, None
        return part

    @property
    def identity(self) -> str:
        """What the order of the samples depends on beside the seed."""
        return self.pairs.identity(self._rows)

    def everything(self) -> list[PreferenceDataset]:
        """Data sets whose epochs together have every pair once, weights aside, the held-out ones too."""
        train = self._with(self.pairs.plain(self._rows.members, self.sequence_length, self._seed))
        return [train, self.validation] if self.validation else [train]

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self._rows)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """input_ids, labels, segment_ids, position_ids of the rows, each (len(indices), sequence_length) int64.

        With a known reference also `reference`, float32: what it gives each label.
        """
        rows = []
        for index in indices:
            sides = [side for pair in self._rows[index] for side in self.pairs[pair]]
            row = write_row(sides, self.sequence_length, self._pad_id)
            if self._reference is not None:
                places = self.places(index)
                row["reference"] = np.zeros(self.sequence_length, np.float32)
                row["reference"][: len(places)] = self._reference[places]
            rows.append(row)
        return stacked(rows)

    def describe(self, index: int) -> str:
        """Where the pairs of a row come from."""
        return self.pairs.describe(self._rows[index])

    def places(self, index: int) -> np.ndarray:
        """Where in `pairs.ids` the tokens stand that the positions of a row predict; padding has none."""
        begins = self.pairs.begins
        sides = [side for pair in self._rows[index] for side in (2 * pair, 2 * pair + 1)]
        return np.concatenate([np.arange(begins[side] + 1, begins[side + 1]) for side in sides])

    def know_reference(self, log_probs: np.ndarray) -> None:
        """From now on batches have what a reference gives each token: (tokens,) float32 of `pairs.ids`."""
        for part in (self, self.validation):
            if part is not None:
                part._reference = log_probs

    def print_summary(self) -> None:
        """What was read and what the rows look like, on one screen."""
        held = len(self.validation._rows.members) if self.validation else 0
        packed = f"packed into {len(self)} rows of {self.sequence_length} tokens, {self._rows.filled():.1%} filled"
        print("\n".join([*self.report.lines(), self.report.balance(len(self._rows.members), held), packed]))
