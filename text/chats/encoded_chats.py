"""Chat data as tokens in memory: read, encoded, cut to length and counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from errors import UserError, waiting
from text.chats.chat_template import encode_chats
from text.chats.conversations import read_conversations
from text.chats.packing import cut_at_turn
from text.chats.token_rows import TokenRows, held_out
from text.sources.registry import Source
from text.sources.row_report import RowReport, balance
from text.sources.rows import source_bytes
from text.tokenizer import Tokenizer

CONVERSATIONS_AT_ONCE = 1000


@dataclass
class ChatReport:
    """What became of the rows of chat data. `read` counts and shows the rows that could not be used.

    `conversations` are those in use, of which `cut` lost turns that have no room, and `unanswered` only what teaches
    nothing; for the `dropped` there is no room for one answer.
    """

    sequence_length: int
    read: RowReport = field(default_factory=RowReport)
    cut: int = 0
    dropped: int = 0
    unanswered: int = 0
    conversations: int = 0
    tokens: int = 0
    learnt: int = 0

    def lines(self) -> list[str]:
        """The report for people, about one screen however much went wrong."""
        lines = self.read.lines()
        if self.dropped:
            length = self.sequence_length
            lines.append(
                f"  {self.dropped} dropped: the first answer to train on ends after {length} tokens; "
                "a longer row keeps more"
            )
        if self.cut:
            lines.append(f"  {self.cut} cut after the last turn that fits into {self.sequence_length} tokens")
        if self.unanswered:
            lines.append(f"  {self.unanswered} cut after the last answer to train on: what follows teaches nothing")
        lines.append(f"{self.conversations} conversations, {self.tokens} tokens, {self.learnt} of them learnt")
        return lines

    def balance(self, train: int, held: int) -> str:
        """What became of every row, in one line. train, held: conversations to train on and held out."""
        used = {"to train on": train, "held out": held, "dropped": self.dropped}
        return balance(self.read.rows, "rows", {**used, **self.read.unused})


class EncodedChats(TokenRows):
    """Conversations as token ids and masks: `chats[i]` is (ids, mask), mask 1 where the token is learnt."""

    report: ChatReport

    @classmethod
    def read(
        cls,
        sources: Sequence[Source | str | Path],
        tokenizer: Tokenizer,
        sequence_length: int,
        on_error: str = "skip",
        progress: bool = True,
    ) -> EncodedChats:
        """Encode the conversations of sources, each cut at a turn to fit into `sequence_length` positions.

        Raises `UserError` for a file that cannot be read and when no conversation is left.
        """
        sources = [Source.of(source) for source in sources]
        report = ChatReport(sequence_length)
        id_type = np.min_scalar_type(tokenizer.vocab_size - 1)
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        owners: list[int] = []
        has_marks = False
        console = Console(stderr=True)
        total = sum(source_bytes(source) for source in sources) or None
        shown = progress and console.is_terminal
        told = waiting("encoding conversations", progress and not shown)
        with told, Progress(transient=True, console=console, disable=not shown) as bar:
            task = bar.add_task("encoding conversations", total=total)
            for owner, source in enumerate(sources):
                conversations = read_conversations(source, on_error, report.read)
                while some := list(islice(conversations, CONVERSATIONS_AT_ONCE)):
                    has_marks |= any("train" in message for messages in some for message in messages)
                    for ids, mask in encode_chats(tokenizer, some):
                        length, fate = fit(mask, sequence_length)
                        if fate:
                            setattr(report, fate, getattr(report, fate) + 1)
                        if length:
                            kept.append(
                                (np.array(ids[:length], dtype=id_type), np.array(mask[:length], dtype=np.uint8))
                            )
                            owners.append(owner)
                    bar.update(task, completed=report.read.bytes_read)
        if not kept:
            raise UserError(f"{', '.join(map(str, sources)) or 'no file'}: nothing to learn; {_why(report)}")
        chats = cls(kept, owners, sources)
        chats.has_marks = has_marks
        report.conversations, report.tokens, report.learnt = len(kept), len(chats.ids), int(chats.mask.sum())
        chats.report = report
        return chats

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.sequence(index)

    def positions(self, members: np.ndarray) -> np.ndarray:
        """How many positions of a row each of the conversations `members` fills."""
        return self.begins[members + 1] - self.begins[members] - 1

    def split(self, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Indices for training and for validation; at least one is held out unless `fraction` is 0.

        A hash of the content decides, so copies of a conversation stay on one side, and the other conversations keep
        their side when data is added. Raises `UserError` when nothing is left to train on.
        """
        return held_out((self[index][0] for index in range(len(self))), len(self), fraction, "conversations")


def fit(mask: Iterable[int], sequence_length: int) -> tuple[int, str]:
    """The number of tokens to keep of a conversation, and its fate: dropped, cut, unanswered; "" where it is whole."""
    mask = np.asarray(mask, dtype=np.int8)
    answered = cut_at_turn(mask, len(mask))
    length = cut_at_turn(mask, sequence_length)
    if length == 0:
        return 0, "dropped"
    return length, "cut" if length < answered else "unanswered" if answered < len(mask) else ""


def _why(report: ChatReport) -> str:
    """One line of reasons why no conversation is left."""
    if report.dropped:
        return (
            f"the first answers of all {report.dropped} conversations end after {report.sequence_length} tokens; "
            "raise --sequence_length"
        )
    return report.read.why_empty()
