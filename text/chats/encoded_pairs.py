"""Preference pairs as tokens in memory: read, encoded, checked for length and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from errors import UserError
from text.chats.chat_template import ROLE_MARKS, encode_chats
from text.chats.encoded_chats import CONVERSATIONS_AT_ONCE
from text.chats.packing import MixedEpochs
from text.chats.preferences import read_preferences
from text.chats.token_rows import TokenRows, held_out
from text.sources.registry import Source
from text.sources.row_report import RowReport, balance
from text.tokenizer import Tokenizer

CUT = ", prompts cut"  # in the identity of pairs of which some are


@dataclass
class PairReport:
    """What became of the rows of preference data. `read` counts and shows the rows that could not be used."""

    sequence_length: int
    read: RowReport = field(default_factory=RowReport)
    too_long: int = 0
    cut: int = 0
    pairs: int = 0
    tokens: int = 0

    def lines(self) -> list[str]:
        """The report for people, about one screen however much went wrong."""
        lines = self.read.lines()
        if self.too_long:
            lines.append(
                f"  {self.too_long} dropped: the last turns alone end after {self.sequence_length} tokens; "
                "a longer --sequence_length keeps more"
            )
        if self.cut:
            lines.append(f"  {self.cut} lost the oldest turns of the prompt to fit into {self.sequence_length} tokens")
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
        cut: bool = True,
    ) -> EncodedPairs:
        """Encode the pairs of sources, each without as many of the oldest turns of its prompt as there is no room for.

        A pair of which the last turns have no room in `sequence_length` is dropped; with `cut=False`, for runs of old,
        every one that is too long.

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
                    excess = max(len(ids) for ids, _ in sides) - (sequence_length + 1)
                    if excess > 0:
                        gone = oldest_turns(sides[0][0], tokenizer, excess) if cut else None
                        if gone is None:
                            report.too_long += 1
                            continue
                        report.cut += 1
                        sides = tuple(
                            (ids[: gone.start] + ids[gone.stop :], mask[: gone.start] + mask[gone.stop :])
                            for ids, mask in sides
                        )
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

    def identity(self, rows: MixedEpochs) -> str:
        return super().identity(rows) + (CUT if self.report.cut else "")

    def split(self, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Indices for training and for validation. All pairs of a prompt are on one side."""
        prompts = (ids[: int(mask.argmax())] for (ids, mask), _ in map(self.__getitem__, range(len(self))))
        return held_out(prompts, len(self), fraction, "pairs")


def oldest_turns(ids: Sequence[int], tokenizer: Tokenizer, excess: int) -> slice | None:
    """Where the fewest turns stand, from the user's first on, that hold `excess` tokens and end before a user's turn.

    A system prompt before them stays, and so does the last question. None where the turns are too short or too few.
    """
    user = tokenizer.special_ids[ROLE_MARKS["user"]]
    first, *others = (place for place, token in enumerate(ids) if token == user)
    return next((slice(first, place) for place in others if place - first >= excess), None)


def last_answer(mask: Sequence[int]) -> np.ndarray:
    """The mask without the answers before the last one."""
    last = np.array(mask, dtype=np.uint8)
    last[: len(last) - int(last[::-1].argmin())] = 0
    return last


def _why(report: PairReport) -> str:
    """One line of reasons why no pair is left."""
    if report.too_long:
        return (
            f"the last turns alone end after {report.sequence_length} tokens in each of {report.too_long}; "
            "raise --sequence_length"
        )
    return report.read.why_empty()
