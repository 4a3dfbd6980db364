"""Conversations and preference pairs in packed rows, in which no conversation sees another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from text.chats.encoded import EncodedChats, EncodedPairs, EncodedSamples
from text.chats.packing import write_row
from text.sources.registry import Source
from text.tokenizer import Tokenizer


class PackedDataset:
    """Samples packed into rows of `sequence_length` tokens.

    Row i is the same on every machine: epoch i // len(self) shuffles the samples by (seed, epoch), packs them again and
    shuffles the rows. Sources with weights are mixed by them, to 1/4096 of the rows: each goes through its own epochs
    at its own pace, and `len` is the rows of all. `report` counts what was read, cut and skipped; `validation` is the
    held-out part, or None: it is shown once, weights aside.
    """

    def __init__(
        self,
        samples: EncodedSamples,
        sequence_length: int,
        pad_id: int,
        seed: int,
        packing: bool = True,
        val_fraction: float = 0.0,
    ) -> None:
        self.samples, self.report = samples, samples.report
        self.sequence_length, self.pad_id, self.seed, self.packing = sequence_length, pad_id, seed, packing
        train, held = samples.split(val_fraction)
        self._rows = samples.packed(train, sequence_length, seed, packing)
        self.validation: PackedDataset | None = self._plain(held) if len(held) else None

    def _plain(self, members: np.ndarray) -> PackedDataset:
        """Return the data set of some of the samples, each once an epoch."""
        part = copy.copy(self)
        part._rows = self.samples.packed(members, self.sequence_length, self.seed, self.packing, mix=False)
        part.validation = None
        return part

    @property
    def identity(self) -> str:
        """What the order of the samples depends on beside the seed."""
        return self.samples.identity(self._rows)

    def __len__(self) -> int:
        """Return the rows of an epoch."""
        return len(self._rows)

    def members(self, index: int) -> np.ndarray:
        """Return the samples of a row, as numbers, in the order in which they stand in it."""
        return self._rows[index]

    def describe(self, index: int) -> str:
        """Return where the samples of a row come from."""
        return self.samples.describe(self.members(index))

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return input_ids, labels, segment_ids, position_ids of rows, each (len(indices), sequence_length) int64."""
        rows = [self._row(index) for index in indices]
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}

    def _row(self, index: int) -> dict[str, np.ndarray]:
        sequences = [self.samples.sequence(number) for number in self.samples.sequences(self.members(index))]
        return write_row(sequences, self.sequence_length, self.pad_id)

    def print_summary(self) -> None:
        """Print what was read and what the rows look like, on one screen."""
        held = len(self.validation._rows.members) if self.validation else 0
        packed = f"packed into {len(self)} rows of {self.sequence_length} tokens, {self._rows.filled():.1%} filled"
        packed += f", and {len(self.validation)} of what is held out" if self.validation else ""
        print("\n".join([*self.report.lines(), self.report.balance(len(self._rows.members), held), packed]))


class ChatDataset(PackedDataset):
    """Conversations for fine-tuning, `chats` before packing."""

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

        Raises `UserError` for a file that cannot be read and when there is nothing to train on.
        """
        self.chats = EncodedChats(sources, tokenizer, sequence_length, on_error, progress)
        super().__init__(self.chats, sequence_length, tokenizer.pad_id, seed, packing, val_fraction)


class PreferenceDataset(PackedDataset):
    """Pairs of answers to one prompt, `pairs` before packing.

    A row has room for two conversations of `sequence_length`, so that both sides of a pair are always in one row: its
    segments 2k and 2k + 1 are the chosen and the rejected conversation of its k-th pair. Labels are the last answer
    and the token that ends it.
    """

    _reference: np.ndarray | None = None

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
        """Read and encode the pairs; `cut` as in `EncodedPairs`. Raises `UserError` as `ChatDataset`."""
        self.pairs = EncodedPairs(sources, tokenizer, sequence_length, on_error, cut)
        super().__init__(self.pairs, 2 * sequence_length, tokenizer.pad_id, seed, val_fraction=val_fraction)

    def everything(self) -> list[PackedDataset]:
        """Return data sets whose epochs together have every pair once, weights aside, the held-out ones too."""
        train = self._plain(self._rows.members)
        return [train, self.validation] if self.validation else [train]

    def know_reference(self, log_probs: np.ndarray) -> None:
        """Let batches have `reference`, float32: what a reference gives each label. log_probs: of `pairs.ids`."""
        for part in (self, self.validation):
            if part is not None:
                part._reference = log_probs

    def places(self, index: int) -> np.ndarray:
        """Return where in `pairs.ids` the tokens stand that the positions of a row predict; padding has none."""
        begins = self.pairs.begins
        sides = self.pairs.sequences(self.members(index))
        return np.concatenate([np.arange(begins[side] + 1, begins[side + 1]) for side in sides])

    def _row(self, index: int) -> dict[str, np.ndarray]:
        row = super()._row(index)
        if self._reference is not None:
            places = self.places(index)
            row["reference"] = np.zeros(self.sequence_length, np.float32)
            row["reference"][: len(places)] = self._reference[places]
        return row
