"""Conversations and preference pairs as token ids in memory: read, encoded, cut to length, counted and held out.

About three bytes a token. Samples that are too long lose turns: a conversation those after the last answer that fits, a
pair the oldest of its prompt.
"""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from errors import QUIET, UserError, waiting
from text.chats.chat_template import ROLE_MARKS, encode_chats
from text.chats.conversations import read_conversations
from text.chats.packing import cut_at_turn
from text.chats.preferences import read_preferences
from text.sources.registry import Source
from text.sources.row_report import RowReport, balance
from text.sources.rows import SUFFIXES, row_files
from text.tokenizer import Tokenizer

ROWS_AT_ONCE = 1000
Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]


@dataclass
class EncodedReport:
    """What became of the rows of a data set. `read` counts and shows the rows that could not be used.

    `count` conversations or pairs are in use; `fates`: how many of them were cut, `unanswered` (turns after the last
    answer), and how many others dropped. descriptions: of each fate, for people.
    """

    what: str
    sequence_length: int
    descriptions: dict[str, str]
    read: RowReport = field(default_factory=RowReport)
    fates: Counter[str] = field(default_factory=Counter)
    count: int = 0
    tokens: int = 0
    trained: int = 0

    def lines(self) -> list[str]:
        """Return the report for people, about one screen however much went wrong."""
        lost = [f"  {self._counted(fate)}" for fate in self.descriptions if self.fates[fate]]
        total = f"{self.count} {self.what}, {self.tokens} tokens, {self.trained} of them trained on"
        return [*self.read.lines(), *lost, total]

    def balance(self, train: int, held: int) -> str:
        """Return what became of every row, in one line. train, held: how many to train on and held out."""
        used = {"to train on": train, "held out": held, "dropped": self.fates["dropped"]}
        return balance(self.read.rows, "rows", {**used, **self.read.unused})

    def why_empty(self) -> str:
        """Return one line of reasons why nothing is left."""
        return f"all {self._counted('dropped')}" if self.fates["dropped"] else self.read.why_empty()

    def _counted(self, fate: str) -> str:
        return f"{self.fates[fate]} {self.descriptions[fate].format(length=self.sequence_length)}"


class EncodedSamples(ABC):
    """Samples of `sides` token sequences each, with masks that are 1 where a token is trained on.

    ids, mask: (tokens,) of all sequences, joined; begins: (sequences + 1,) where each begins; owners: (samples,) which
    of the `sources` a sample comes from; has_marks: whether some of the assistant's turns are marked as not trained on,
    so that the ids alone do not determine the mask.
    """

    what: str
    sides = 1
    descriptions: ClassVar[dict[str, str]]
    has_marks = False

    def __init__(
        self,
        sources: Sequence[Source | str | Path],
        tokenizer: Tokenizer,
        sequence_length: int,
        on_error: str = "skip",
        progress: bool = False,
    ) -> None:
        """Read and encode the sources, each sample to fit into `sequence_length` positions a side.

        Raises `UserError` for a file that cannot be read and when no sample is left.
        """
        self.sources = [Source.of(source) for source in sources]
        self.report = EncodedReport(self.what, sequence_length, self.descriptions)
        id_type = np.min_scalar_type(tokenizer.vocab_size - 1)
        sequences: list[tuple[np.ndarray, np.ndarray]] = []
        owners: list[int] = []
        title, shown = f"encoding {self.what}", progress and sys.stderr.isatty()
        files = [file for source in self.sources for file in row_files(source, SUFFIXES, RowReport())]
        size = sum(file.stat().st_size for file in files if isinstance(file, Path)) or None
        quiet = 0.0 if shown else QUIET  # in a log file each refresh is a line
        pace = {"delay": quiet, "mininterval": quiet or 0.1, "maxinterval": quiet or 10.0}
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=title, leave=False, disable=not progress, **pace)
        with waiting(title, progress and not shown), bar:
            for owner, source in enumerate(self.sources):
                rows = self._read(source, on_error)
                while some := list(islice(rows, ROWS_AT_ONCE)):
                    for sample in self._encode(tokenizer, some):
                        sequences += [(np.array(ids, id_type), np.array(mask, np.uint8)) for ids, mask in sample]
                        owners.append(owner)
                    bar.update(self.report.read.bytes_read - bar.n)
        if not sequences:
            names = ", ".join(map(str, self.sources)) or "no file"
            raise UserError(f"{names}: no {self.what} to train on; {self.report.why_empty()}")
        self.ids, self.mask = (np.concatenate(parts) for parts in zip(*sequences, strict=True))
        self.begins = np.cumsum([0, *(len(ids) for ids, _ in sequences)])
        self.owners = np.array(owners)
        self.report.count, self.report.tokens, self.report.trained = len(owners), len(self.ids), int(self.mask.sum())

    @abstractmethod
    def _read(self, source: Source, on_error: str) -> Iterator[Any]:
        """Yield the rows of a source that can be read."""

    @abstractmethod
    def _encode(self, tokenizer: Tokenizer, rows: Sequence[Any]) -> Iterator[Sequences]:
        """Yield the sequences of each row that fits, and count what became of the others."""

    def _content(self, index: int) -> np.ndarray:
        """Return the tokens that decide on which side of the split a sample is."""
        return self.sequence(index)[0]

    def __len__(self) -> int:
        return len(self.owners)

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and mask of one sequence, (tokens,) each."""
        span = slice(self.begins[number], self.begins[number + 1])
        return self.ids[span], self.mask[span]

    def sequences(self, members: Iterable[int]) -> list[int]:
        """Return the numbers of the sequences of samples, in their order."""
        return [self.sides * member + side for member in members for side in range(self.sides)]

    def positions(self, members: np.ndarray) -> np.ndarray:
        """Return how many positions of a row each of the samples fills, all sides together."""
        first = self.sides * members
        return self.begins[first + self.sides] - self.begins[first] - self.sides

    def split(self, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Return indices for training and for validation; at least one is held out unless `fraction` is 0.

        A hash of the content decides, so copies stay on one side, and the other samples keep their side when data is
        added. Raises `UserError` when nothing is left to train on.
        """
        if not 0 <= fraction < 1:
            raise UserError(f"--val_fraction {fraction}: must be at least 0 and below 1")
        everything = np.arange(len(self))
        if fraction == 0:
            return everything, everything[:0]
        digests = (hashlib.blake2b(self._content(i).astype("<u4").tobytes(), digest_size=8) for i in everything)
        hashes = np.array([int.from_bytes(digest.digest(), "little") / 2**64 for digest in digests])
        held = hashes < max(fraction, np.nextafter(hashes.min(), 1))
        if held.all():
            what = f"{len(self)} {self.what}"
            raise UserError(f"--val_fraction {fraction}: holds out all {what}; add data or pass --val_fraction 0")
        return everything[~held], everything[held]

    @property
    def fingerprint(self) -> str:
        """The same for the same sequences with the same masks in the same order."""
        digest = hashlib.blake2b(self.begins.astype("<i8").tobytes(), digest_size=16)
        digest.update(self.ids.astype("<u4").tobytes())
        if self.has_marks:
            digest.update(np.packbits(self.mask).tobytes())
        return digest.hexdigest()


class EncodedChats(EncodedSamples):
    """Conversations: `chats[i]` is (ids, mask), mask 1 on the assistant's words and the tokens that end its turns."""

    what = "conversations"
    descriptions: ClassVar[dict[str, str]] = {
        "dropped": "dropped: the first answer to train on ends after {length} tokens; raise --sequence_length",
        "cut": "cut after the last turn that fits into {length} tokens",
        "unanswered": "cut after the last answer to train on: what follows teaches nothing",
    }

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.sequence(index)

    def _read(self, source: Source, on_error: str) -> Iterator[Any]:
        return read_conversations(source, on_error, self.report.read)

    def _encode(self, tokenizer: Tokenizer, rows: Sequence[Any]) -> Iterator[Sequences]:
        self.has_marks |= any("train" in message for messages in rows for message in messages)
        for ids, mask in encode_chats(tokenizer, rows):
            length, fate = fit(mask, self.report.sequence_length)
            self.report.fates[fate] += 1
            if length:
                yield [(ids[:length], mask[:length])]


class EncodedPairs(EncodedSamples):
    """Pairs of a chosen and a rejected conversation: `pairs[i]` is two (ids, mask).

    The mask is 1 on the last answer and the token that ends it: only these are compared. All pairs of a prompt are on
    one side of a split. cut=False, for runs of old: every pair that is too long is dropped.
    """

    what = "pairs"
    sides = 2
    descriptions: ClassVar[dict[str, str]] = {
        "dropped": "dropped: the last turns alone end after {length} tokens; raise --sequence_length",
        "cut": "lost the oldest turns of the prompt to fit into {length} tokens",
    }

    def __init__(
        self,
        sources: Sequence[Source | str | Path],
        tokenizer: Tokenizer,
        sequence_length: int,
        on_error: str = "skip",
        cut: bool = True,
        progress: bool = False,
    ) -> None:
        self.cut = cut
        super().__init__(sources, tokenizer, sequence_length, on_error, progress)

    def __getitem__(self, index: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return self.sequence(2 * index), self.sequence(2 * index + 1)

    def _read(self, source: Source, on_error: str) -> Iterator[Any]:
        return read_preferences(source, on_error, self.report.read)

    def _encode(self, tokenizer: Tokenizer, rows: Sequence[Any]) -> Iterator[Sequences]:
        encoded = encode_chats(tokenizer, [side for pair in rows for side in pair])
        for pair in zip(encoded[::2], encoded[1::2], strict=True):
            sides, fate = fit_pair(pair, tokenizer, self.report.sequence_length, self.cut)
            self.report.fates[fate] += 1
            if sides:
                yield sides

    def _content(self, index: int) -> np.ndarray:
        ids, mask = self.sequence(2 * index)
        return ids[: int(mask.argmax())]


def fit(mask: Iterable[int], sequence_length: int) -> tuple[int, str]:
    """Return how many tokens of a conversation to keep, and its fate: dropped, cut, unanswered; "" for a whole one."""
    mask = bytes(mask)
    answered = cut_at_turn(mask, len(mask))
    length = cut_at_turn(mask, sequence_length)
    if length == 0:
        return 0, "dropped"
    return length, "cut" if length < answered else "unanswered" if answered < len(mask) else ""


def fit_pair(
    pair: Sequences, tokenizer: Tokenizer, sequence_length: int, cut: bool = True
) -> tuple[list[tuple[np.ndarray, np.ndarray]], str]:
    """Return both sides as they are compared, none where they are too long, and their fate: dropped, cut; "" for whole.

    cut: whether sides that are too long lose the oldest turns of their prompt.
    """
    excess, gone, fate = max(len(ids) for ids, _ in pair) - (sequence_length + 1), slice(0, 0), ""
    if excess > 0:
        oldest = oldest_turns(pair[0][0], tokenizer, excess) if cut else None
        if oldest is None:
            return [], "dropped"
        gone, fate = oldest, "cut"
    return [(np.delete(ids, gone), last_answer(np.delete(mask, gone))) for ids, mask in pair], fate


def oldest_turns(ids: Sequence[int], tokenizer: Tokenizer, excess: int) -> slice | None:
    """Return where the fewest turns stand, from the user's first on, that hold `excess` tokens.

    They end before a user's turn. A system prompt before them stays, and so does the last question. None where the
    turns are too short or too few.
    """
    user = tokenizer.special_ids[ROLE_MARKS["user"]]
    first, *others = (place for place, token in enumerate(ids) if token == user)
    return next((slice(first, place) for place in others if place - first >= excess), None)


def last_answer(mask: Sequence[int]) -> np.ndarray:
    """Return the mask without the answers before the last one."""
    last = np.array(mask, dtype=np.uint8)
    last[: len(last) - int(last[::-1].argmin())] = 0
    return last
