"""Conversations and preference pairs in packed rows, in which no conversation sees another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from errors import UserError, folded
from text.chats.encoded import EncodedChats, EncodedPairs, EncodedSamples
from text.chats.packing import pack_best_fit, write_row
from text.order import BLOCK, block_shares, mixed
from text.sources.registry import Source, weights
from text.tokenizer import Tokenizer

CUT = ", prompts cut"  # in the identity of pairs of which some are


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
        mixture = weights(samples.sources)
        for number, source in enumerate(samples.sources if mixture else []):
            if not (samples.owners[train] == number).any():
                raise UserError(f"{source}: nothing of it is left to train on; fix it or leave it out of the mixture")
        self._fill(train, mixture)
        self.validation: PackedDataset | None = self._plain(held) if len(held) else None

    def _fill(self, members: np.ndarray, mixture: Sequence[float] | None) -> None:
        """Pack samples, given as numbers. A row of a mixture holds samples of one source."""
        self._members = members
        self._shares = block_shares(mixture) if mixture and len(mixture) > 1 else [BLOCK]
        is_mixed, owners = len(self._shares) > 1, self.samples.owners[members]
        self._parts = [members[owners == owner] for owner in range(len(self._shares))] if is_mixed else [members]
        # Rows asked for together are at most a block apart; beside these, a batch may reach into the next epoch.
        block = BLOCK if is_mixed else 0
        fewest = [-(-int(self.samples.positions(part).sum()) // self.sequence_length) for part in self._parts]
        self._epoch = lru_cache(maxsize=sum(2 + block // rows for rows in fewest))(self._packed)
        # The same in each epoch, as best-fit's number of rows depends on the lengths alone.
        self._lengths = [len(self._epoch(part, 0)) for part in range(len(self._parts))]

    def _packed(self, part: int, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng([self.seed, epoch])
        members = random.permutation(self._parts[part])
        if self.packing:
            rows = [members[row] for row in pack_best_fit(self.samples.positions(members), self.sequence_length)]
        else:
            rows = list(members[:, None])
        return [rows[place] for place in random.permutation(len(rows))]

    def _plain(self, members: np.ndarray) -> PackedDataset:
        """Return the data set of some of the samples, each once an epoch."""
        part = copy.copy(self)
        part.validation = None
        part._fill(members, None)
        return part

    @property
    def identity(self) -> str:
        """What the order of training depends on beside the seed: the samples and their shares of a mixture."""
        shares = ":".join(map(str, self._shares))
        return f"{len(self._members)} samples of {self.samples.fingerprint[:12]}, shares {shares}"

    def __len__(self) -> int:
        """Return the rows of an epoch of every source."""
        return sum(self._lengths)

    def members(self, index: int) -> np.ndarray:
        """Return the samples of a row, counted from the start of training, in the order in which they stand in it."""
        part, number = mixed(int(index), self._shares, self.seed)
        epoch, place = divmod(number, self._lengths[part])
        return self._epoch(part, epoch)[place]

    def describe(self, index: int) -> str:
        """Return where the samples of a row come from: the source, and which of its samples in use, from 1."""
        sources, owners = self.samples.sources, self.samples.owners
        first = [int(np.searchsorted(owners, owner)) for owner in range(len(sources))]
        owned = ((owners[member], member) for member in self.members(index))
        return ", ".join(f"{sources[owner]} #{member - first[owner] + 1}" for owner, member in owned)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return input_ids, labels, segment_ids, position_ids of rows, each (len(indices), sequence_length) int64."""
        rows = [self._row(index) for index in indices]
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}

    def _row(self, index: int) -> dict[str, np.ndarray]:
        sequences = [self.samples.sequence(number) for number in self.samples.sequences(self.members(index))]
        return write_row(sequences, self.sequence_length, self.pad_id)

    def print_summary(self) -> None:
        """Print what was read and what the rows look like, on one screen."""
        held = len(self.validation._members) if self.validation else 0
        filled = float(self.samples.positions(self._members).sum() / (len(self) * self.sequence_length))
        packed = f"packed into {len(self)} rows of {self.sequence_length} tokens, {filled:.1%} filled"
        packed += f", and {len(self.validation)} of what is held out" if self.validation else ""
        print(folded("\n".join([*self.report.lines(), self.report.balance(len(self._members), held), packed])))


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
        progress: bool = True,
    ) -> None:
        """Read and encode the pairs; `cut` as in `EncodedPairs`. Raises `UserError` as `ChatDataset`."""
        self.pairs = EncodedPairs(sources, tokenizer, sequence_length, on_error, cut, progress)
        super().__init__(self.pairs, 2 * sequence_length, tokenizer.pad_id, seed, val_fraction=val_fraction)

    @property
    def identity(self) -> str:
        return super().identity + (CUT if self.report.fates["cut"] else "")

    def everything(self) -> list[PackedDataset]:
        """Return data sets whose epochs together have every pair once, weights aside, the held-out ones too."""
        train = self._plain(self._members)
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
