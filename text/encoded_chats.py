"""Chat data as tokens in memory: read, encoded, cut to length and counted. About three bytes a token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from errors import UserError
from text.chat_template import encode_chats
from text.conversations import read_conversations
from text.json_rows import RowReport, json_files
from text.packing import cut_at_turn
from text.tokenizer import Tokenizer

CONVERSATIONS_AT_ONCE = 1000


@dataclass
class ChatReport:
    """What became of the rows of chat data. `read` counts and shows the rows that could not be used."""

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
                f"  {self.dropped} dropped: the first answer ends after {length} tokens; a longer row keeps more"
            )
        if self.cut:
            lines.append(f"  {self.cut} cut after the last turn that fits into {self.sequence_length} tokens")
        if self.unanswered:
            lines.append(f"  {self.unanswered} cut after the last answer: what follows it teaches nothing")
        lines.append(f"{self.conversations} conversations, {self.tokens} tokens, {self.learnt} of them learnt")
        return lines


class EncodedChats:
    """Conversations as token ids and masks: `chats[i]` is (ids, mask), mask 1 where the token is learnt."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray, begins: np.ndarray, report: ChatReport) -> None:
        """ids, mask: (tokens,) of all conversations in turn; begins: (conversations + 1,) where each begins."""
        self.ids, self.mask, self.begins, self.report = ids, mask, begins, report

    @classmethod
    def read(
        cls,
        paths: Sequence[str | Path],
        tokenizer: Tokenizer,
        sequence_length: int,
        on_error: str = "skip",
        progress: bool = True,
    ) -> EncodedChats:
        """Encode the conversations of files and folders, each cut at a turn to fit into `sequence_length` positions.

        Raises `UserError` for a file that cannot be read and when no conversation is left.
        """
        report = ChatReport(sequence_length)
        id_type = np.min_scalar_type(tokenizer.vocab_size - 1)
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        files = [file for path in paths for file in json_files(path)]
        console = Console(stderr=True)
        with Progress(transient=True, console=console, disable=not (progress and console.is_terminal)) as bar:
            task = bar.add_task("encoding conversations", total=sum(file.stat().st_size for file in files))
            for file in files:
                conversations = read_conversations(file, on_error, report.read)
                while some := list(islice(conversations, CONVERSATIONS_AT_ONCE)):
                    for ids, mask in encode_chats(tokenizer, some):
                        length = _fit(mask, report)
                        if length:
                            kept.append(
                                (np.array(ids[:length], dtype=id_type), np.array(mask[:length], dtype=np.uint8))
                            )
                    bar.update(task, completed=report.read.bytes_read)
        if not kept:
            raise UserError(f"{', '.join(map(str, paths)) or 'no file'}: nothing to learn; {_why(report)}")
        all_ids, all_mask = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        begins = np.cumsum([0, *(len(ids) for ids, _ in kept)])
        report.conversations, report.tokens, report.learnt = len(kept), len(all_ids), int(all_mask.sum())
        return cls(all_ids, all_mask, begins, report)

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.begins[index], self.begins[index + 1])
        return self.ids[span], self.mask[span]

    def positions(self, members: np.ndarray) -> np.ndarray:
        """How many positions of a row each of the conversations `members` fills."""
        return self.begins[members + 1] - self.begins[members] - 1

    def split(self, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Indices for training and for validation; at least one is held out unless `fraction` is 0.

        A hash of the content decides, so copies of a conversation stay on one side, and the other conversations keep
        their side when data is added. Raises `UserError` when nothing is left to train on.
        """
        return held_out((self[index][0] for index in range(len(self))), len(self), fraction, "conversations")


def held_out(contents: Iterable[np.ndarray], size: int, fraction: float, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and indices held out, at least one of these unless `fraction` is 0, by a hash of the content.

    contents: token ids of `size` samples; what: their name in an error. Raises `UserError` when nothing is left.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"--val_fraction {fraction}: must be at least 0 and below 1")
    everything = np.arange(size)
    if fraction == 0:
        return everything, everything[:0]
    hashes = np.array([_hash(ids) for ids in contents])
    held = hashes < max(fraction, np.nextafter(hashes.min(), 1))
    if held.all():
        raise UserError(f"--val_fraction {fraction}: holds out all {size} {what}; add data or pass --val_fraction 0")
    return everything[~held], everything[held]


def _fit(mask: Iterable[int], report: ChatReport) -> int:
    """The number of tokens to keep, with what is lost counted."""
    mask = np.asarray(mask, dtype=np.int8)
    answered = cut_at_turn(mask, len(mask))
    length = cut_at_turn(mask, report.sequence_length)
    report.unanswered += answered < len(mask)
    report.dropped += length == 0
    report.cut += 0 < length < answered
    return length


def _hash(ids: np.ndarray) -> float:
    """From 0 to 1, the same for the same tokens."""
    digest = hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _why(report: ChatReport) -> str:
    """One line of reasons why no conversation is left."""
    if report.dropped:
        return (
            f"the first answers of all {report.dropped} conversations end after {report.sequence_length} tokens; "
            "raise --sequence_length"
        )
    return report.read.why_empty()
