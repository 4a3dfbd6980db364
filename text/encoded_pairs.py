"""Preference pairs as tokens in memory: read, encoded, checked for length and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from errors import UserError
from text.chat_template import encode_chats
from text.encoded_chats import CONVERSATIONS_AT_ONCE
from text.preferences import read_preferences
from text.registry import Source
from text.row_report import RowReport, balance
from text.token_rows import TokenRows, held_out
from text.tokenizer import Tokenizer


@dataclass
class PairReport:
    """What became of the rows of preference data. `read` counts and shows the rows that could not be used."""

    sequence_length: int
    read: RowReport = field(default_factory=RowReport)
    too_long: int = 0
    pairs: int = 0
    tokens: int = 0

    def lines(self) -> list[str]:
        """The report for people, about one screen however much went wrong."""
        lines = self.read.lines()
        if self.too_long:
            lines.append(f"  {self.too_long} dropped: an answer ends after {self.sequence_length} tokens")
        lines.append(f"{self.pairs} pairs, {self.tokens} tokens")
        return lines

    def balance(self, train: int, held: int) -> str:
        """What became of every row, in one line. train, held: pairs to train on and held out."""
        used = {"to train on": train, "held out": held, "dropped": self.too_long}
        return balance(self.read.rows, "rows", {**used, **self.read.unused})


class EncodedPairs(TokenRows):
    """Pairs as token ids and masks: `pairs[i]` is two (ids, mask), of the chosen and of the rejected conversation.

    The mask is 1 on the last answer and the token that ends it: only these are compared.
    """

    report: PairReport

    @classmethod
    def read(
        cls,
        sources: Sequence[Source | str | Path],
        tokenizer: Tokenizer,
        sequence_length: int,
        on_error: str = "skip",
    ) -> EncodedPairs:
        """Encode the pairs of sources. A pair of which one side has no room in `sequence_length` is dropped.

        Raises `UserError` for a file that cannot be read and when no pair is left.
        """
        sources = [Source.of(source) for source in sources]
        report = PairReport(sequence_length)
        id_type = np.min_scalar_type(tokenizer.vocab_size - 1)
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        owners: list[int] = []
        for owner, source in enumerate(sources):
            pairs = read_preferences(source, on_error, report.read)
            while some := list(islice(pairs, CONVERSATIONS_AT_ONCE)):
                encoded = encode_chats(tokenizer, [side for pair in some for side in pair])
                for sides in zip(encoded[::2], encoded[1::2], strict=True):
                    if max(len(ids) for ids, _ in sides) > sequence_length + 1:
                        report.too_long += 1
                        continue
                    kept += [(np.array(ids, dtype=id_type), last_answer(mask)) for ids, mask in sides]
                    owners.append(owner)
        if not kept:
            raise UserError(f"{', '.join(map(str, sources)) or 'no file'}: no pair to learn from; {_why(report)}")
        pairs_read = cls(kept, owners, sources)
        report.pairs, report.tokens = len(owners), len(pairs_read.ids)
        pairs_read.report = report
        return pairs_read

    def __len__(self) -> int:
        return len(self.begins) // 2

    def __getitem__(self, index: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return self.sequence(2 * index), self.sequence(2 * index + 1)

    def positions(self, members: np.ndarray) -> np.ndarray:
        """How many positions of a row each of the pairs `members` fills, both sides together."""
        return self.begins[2 * members + 2] - self.begins[2 * members] - 2

    def split(self, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Indices for training and for validation. All pairs of a prompt are on one side."""
        prompts = (ids[: int(mask.argmax())] for (ids, mask), _ in map(self.__getitem__, range(len(self))))
        return held_out(prompts, len(self), fraction, "pairs")


def last_answer(mask: Sequence[int]) -> np.ndarray:
    """The mask without the answers before the last one."""
    last = np.array(mask, dtype=np.uint8)
    last[: len(last) - int(last[::-1].argmin())] = 0
    return last


def _why(report: PairReport) -> str:
    """One line of reasons why no pair is left."""
    if report.too_long:
        return (
            f"an answer ends after {report.sequence_length} tokens in each of {report.too_long}; "
            "raise --sequence_length"
        )
    return report.read.why_empty()
