"""The data sets that the stage scripts import.

A data set has `len` (samples of an epoch) and `batch(indices)`. An index is the number of a sample counted from the
start of training; which sample that is depends on the seed and the index alone, so nothing about the data need be
saved to resume. A batch is a dict of int64 tensors (samples, sequence_length): `input_ids`; `labels`, where labels[t]
is the token that position t must predict and -100 counts nothing; and with isolation `segment_ids`, whose positions
see only their own segment, and `position_ids`, which begin at 0 in each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from errors import UserError
from text.chat_template import Message, encode_chats
from text.encoded_chats import EncodedChats
from text.encoded_pairs import EncodedPairs
from text.json_rows import RowReport
from text.order import block_shares, mixed, scramble, shuffled
from text.packing import IGNORED_LABEL, PADDING_SEGMENT, PackedEpochs, write_row
from text.problems import ListedProblems, Problem, Problems, open_problems
from text.shard_set import ShardSet
from text.tokenizer import Tokenizer


class PretrainDataset:
    """Windows of consecutive tokens over the shards' documents, as DeepSeek-V3 packs them (section 4.2).

    Window w holds tokens w*L to w*L + L of a source's stream: L inputs, and the same shifted by one as labels.

    `split="train"`: an epoch shows every full window once, shuffled anew each epoch; the last, partial window is left
    out. Several sources are mixed by weight, to 1/4096: each goes through its own epochs at its own pace, and `len` is
    the windows of all. `split="val"`: every token but a stream's first is a label exactly once, in order, weights
    aside, and the last window is filled up with </s> inputs and labels that count nothing.

    `isolate=True` makes each document a segment; the first token of a document is then no label, since the position
    before it belongs to another segment.
    """

    def __init__(
        self,
        sources: list[tuple[ShardSet, float]],
        sequence_length: int,
        seed: int = 0,
        split: str = "train",
        isolate: bool = False,
    ) -> None:
        """Raises `UserError` when a source has no full window to train on, or none has anything to validate on."""
        self.sequence_length = sequence_length
        self._seed, self._is_train, self._isolate = seed, split == "train", isolate
        self._eos_id = sources[0][0].eos_id
        self._streams = [shards.split(split) for shards, _ in sources]
        if self._is_train:
            for (shards, weight), stream in zip(sources, self._streams, strict=True):
                if not 0 < weight < float("inf"):
                    raise UserError(f"{shards.folder}: weight {weight}; give a number above 0")
                if stream.tokens <= sequence_length:
                    raise UserError(
                        f"{shards.folder}: {stream.tokens:,} tokens to train on, fewer than one window of "
                        f"{sequence_length + 1:,}; add text or lower the sequence length"
                    )
            self._windows = [(stream.tokens - 1) // sequence_length for stream in self._streams]
            self._shares = block_shares([weight for _, weight in sources])
        else:
            self._windows = [-(-max(stream.tokens - 1, 0) // sequence_length) for stream in self._streams]
            if not sum(self._windows):
                folders = ", ".join(str(shards.folder) for shards, _ in sources)
                raise UserError(f"{folders}: nothing is held out to validate on; add documents or set val_fraction 0")

    def __len__(self) -> int:
        return sum(self._windows)

    @property
    def tokens_per_epoch(self) -> int:
        """Labels of `len` samples, those that count nothing included."""
        return len(self) * self.sequence_length

    def locate(self, index: int) -> tuple[int, int]:
        """(source, window) of a sample."""
        if not self._is_train:
            source, window = 0, index % len(self)
            while window >= self._windows[source]:
                window -= self._windows[source]
                source += 1
            return source, window
        source, number = (0, index) if len(self._windows) == 1 else mixed(index, self._shares, self._seed)
        epoch, place = divmod(number, self._windows[source])
        return source, shuffled(place, self._windows[source], self._seed, source, epoch)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The samples of these indices."""
        length = self.sequence_length
        inputs = np.full((len(indices), length), self._eos_id, np.int64)
        labels = np.full((len(indices), length), IGNORED_LABEL, np.int64)
        padding = np.ones((len(indices), length), bool)
        for row, index in enumerate(indices):
            source, window = self.locate(index)
            stream = self._streams[source]
            tokens = stream.read(window * length, min((window + 1) * length + 1, stream.tokens))
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, : len(tokens) - 1] = tokens[1:]
            padding[row, : len(tokens) - 1] = False
        batch = {"input_ids": inputs, "labels": labels}
        if self._isolate:
            labels[inputs == self._eos_id] = IGNORED_LABEL
            batch |= _segments(inputs == self._eos_id)
            batch["segment_ids"][padding] = PADDING_SEGMENT
        return {name: torch.from_numpy(array) for name, array in batch.items()}


class ChatDataset:
    """Conversations for fine-tuning, packed into rows in which none sees another.

    Sample i is the same on every machine: epoch i // len(self) shuffles the conversations by (seed, epoch), packs
    them anew and shuffles the rows. `report` counts what was read, cut and skipped; `validation` is the held-out part
    as a data set of its own, or None.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        tokenizer: Tokenizer,
        sequence_length: int,
        seed: int = 0,
        on_error: str = "skip",
        packing: bool = True,
        val_fraction: float = 0.0,
        progress: bool = True,
    ) -> None:
        """Read and encode the files or folders in `paths`; `packing=False` gives each conversation its own row.

        Raises `UserError` for a file that cannot be read and when there is nothing to learn.
        """
        self.sequence_length, self.seed, self.packing = sequence_length, seed, packing
        self.chats = EncodedChats.read(paths, tokenizer, sequence_length, on_error, progress)
        self.report = self.chats.report
        self.pad_id = tokenizer.pad_id
        train, held = self.chats.split(val_fraction)
        self.validation = self._part(held) if len(held) else None
        self._choose(train)

    def _part(self, members: np.ndarray) -> ChatDataset:
        part = copy.copy(self)
        part.validation = None
        part._choose(members)
        return part

    def _choose(self, members: np.ndarray) -> None:
        self._rows = PackedEpochs(members, self.chats.positions, self.sequence_length, self.seed, self.packing)

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
        return _stacked(rows)

    def members(self, index: int) -> np.ndarray:
        """The conversations of a row, as numbers in `chats`, in the order in which they stand in it."""
        return self._rows[index]

    def filled(self) -> float:
        """The share of positions that hold conversations rather than padding."""
        return self._rows.filled()

    def print_summary(self) -> None:
        """What was read and what the rows look like, on one screen."""
        rows = f"{len(self)} rows of {self.sequence_length} tokens, {self.filled():.1%} filled"
        held = f"; {len(self.validation)} rows held out" if self.validation else ""
        print("\n".join([*self.report.lines(), rows + held]))


class PreferenceDataset:
    """Pairs of answers to one prompt, packed into rows in which no conversation sees another.

    A row has room for two conversations of `sequence_length`, so that both sides of a pair are always in one row: its
    segments 2k and 2k + 1 are the chosen and the rejected conversation of its k-th pair. Labels are the last answer
    and the token that ends it. Order, `report` and `validation` are as in `ChatDataset`.

    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        tokenizer: Tokenizer,
        sequence_length: int,
        seed: int = 0,
        on_error: str = "skip",
        val_fraction: float = 0.0,
    ) -> None:
        """Raises `UserError` for a file that cannot be read and when there is nothing to learn."""
        self.pairs = EncodedPairs.read(paths, tokenizer, sequence_length, on_error)
        self.report, self.sequence_length = self.pairs.report, 2 * sequence_length
        self._reference: np.ndarray | None = None
        self._pad_id = tokenizer.pad_id
        train, held = self.pairs.split(val_fraction)
        self._rows = PackedEpochs(train, self.pairs.positions, self.sequence_length, seed, packing=True)
        self.validation: PreferenceDataset | None = None
        if len(held):
            self.validation = copy.copy(self)
            self.validation._rows = PackedEpochs(held, self.pairs.positions, self.sequence_length, seed, packing=True)

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
        return _stacked(rows)

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
        rows = f"{len(self)} rows of {self.sequence_length} tokens, {self._rows.filled():.1%} filled"
        print("\n".join([*self.report.lines(), f"{rows}; {held} pairs held out"]))


def _stacked(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


class PromptDataset:
    """Problems as prompts for a model that answers them itself: `prompt(i)` is a function of (seed, i) alone.

    Several sources are mixed by weight, each going through its own epochs. `validation` are problems held out;
    `report` counts the rows that were read and skipped.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, float]],
        tokenizer: Tokenizer,
        longest: int,
        seed: int = 0,
        system: str = "",
        on_error: str = "skip",
        val_fraction: float = 0.0,
        val_problems: int = 0,
    ) -> None:
        """Open files, folders or generators by name (see `text.problems`), each with its weight.

        Args:
            longest: tokens that a prompt may have; longer ones of a file are counted and left out.
            system: system prompt before every question; empty for none.
            val_problems: how many to hold out, over all sources: of a file at most the share `val_fraction`.
        Raises:
            UserError: a source that cannot be read or has no problem left.
        """
        self.tokenizer, self.longest, self.seed, self.system = tokenizer, longest, seed, system
        self.report, self.too_long = RowReport(), 0
        self._shares = block_shares([weight for _, weight in sources])
        self._sources: list[Problems] = []
        self.validation: list[Problem] = []
        for name, _ in sources:
            problems = open_problems(name, on_error, self.report, val_fraction)
            if isinstance(problems, ListedProblems):
                problems = self._fitting(name, problems)
            self._sources.append(problems)
            self.validation += problems.held_out(-(-val_problems // len(sources)))

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def problem(self, index: int, turn: int = 0) -> Problem:
        """Problem `index`, counted from the start of training; another `turn` is another order of the same data."""
        seed = scramble(self.seed, turn) if turn else self.seed
        source, number = (0, index) if len(self._sources) == 1 else mixed(index, self._shares, seed)
        return self._sources[source].problem(number, seed)

    def encode(self, problems: Sequence[Problem]) -> list[list[int]]:
        """The token ids of each prompt, up to where the answer begins."""
        conversations = [self._messages(problem) for problem in problems]
        encoded = [ids for ids, _ in encode_chats(self.tokenizer, conversations, add_generation_prompt=True)]
        for ids, problem in zip(encoded, problems, strict=True):
            if len(ids) > self.longest:
                raise UserError(
                    f"a prompt of {problem.kind} has {len(ids)} tokens, but {self.longest} is the most; "
                    "raise --sequence_length or lower --max_new_tokens"
                )
        return encoded

    def print_summary(self) -> None:
        """What was read, on one screen."""
        lines = self.report.lines() if self.report.rows else []
        if self.too_long:
            lines.append(f"  {self.too_long} left out: longer than {self.longest} tokens; raise --sequence_length")
        print("\n".join([*lines, f"{len(self)} problems an epoch; {len(self.validation)} held out"]))

    def _fitting(self, name: str, problems: ListedProblems) -> ListedProblems:
        parts = []
        for part in (problems.train, problems.held):
            encoded = encode_chats(self.tokenizer, [self._messages(problem) for problem in part], True)
            parts.append([problem for problem, (ids, _) in zip(part, encoded, strict=True) if len(ids) <= self.longest])
            self.too_long += len(part) - len(parts[-1])
        if not parts[0]:
            raise UserError(
                f"{name}: all prompts have more than {self.longest} tokens; raise --sequence_length or lower "
                "--max_new_tokens"
            )
        return ListedProblems(*parts)

    def _messages(self, problem: Problem) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": problem.question}]


def _segments(is_end: np.ndarray) -> dict[str, np.ndarray]:
    """segment_ids and position_ids, int64, from where documents end; all (samples, time)."""
    starts = np.zeros_like(is_end)
    starts[:, 1:] = is_end[:, :-1]
    times = np.broadcast_to(np.arange(is_end.shape[1]), is_end.shape)
    first = np.maximum.accumulate(np.where(starts, times, 0), axis=1)
    return {"segment_ids": np.cumsum(starts, axis=1, dtype=np.int64), "position_ids": times - first}
