"""Any source as its stage would see it: which kind of data it is, its rows with their tokens, and all that it holds."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from errors import UserError
from text.chats.chat_template import encode_chats
from text.chats.conversations import to_messages
from text.chats.encoded import ROWS_AT_ONCE, fit, fit_pair, last_answer
from text.chats.preferences import to_preference
from text.chats.problems import COLUMNS, is_generated, open_problems, problem_reader
from text.chats.prompt_dataset import encode_prompts
from text.corpus.corpus import Corpus
from text.corpus.documents import Cleaner
from text.order import ANSWER_TOKENS, PAIR_TOKENS, ROW_TOKENS
from text.sources.folders import Folder
from text.sources.formats import FORMATS
from text.sources.registry import Source
from text.sources.row_report import RowReport, balance
from text.sources.rows import SUFFIXES, placed_rows, read_rows
from text.tokenizer import Tokenizer

ROWS_LOOKED_AT = 100
NOUNS = {"text": "documents", "chat": "conversations", "preference": "pairs", "prompt": "prompts"}
CUT = {"chat": "cut after the last answer that fits", "preference": "cut: without the oldest turns of their prompt"}

Sequences = list[tuple[Sequence[int], Sequence[int]]]
"""The token sequences of one row, each (ids, mask)."""


@dataclass(frozen=True)
class Limits:
    """The tokens that a stage has room for, as it has by itself where nobody says otherwise.

    context: most positions of the model, which the length of pairs is lowered to.
    """

    sequence_length: int | None = None
    max_new_tokens: int = ANSWER_TOKENS
    context: int | None = None

    def row(self, kind: str) -> int:
        """Return the tokens of a row, or of each side of a pair."""
        if self.sequence_length is not None:
            return self.sequence_length
        return min(PAIR_TOKENS, self.context or PAIR_TOKENS) if kind == "preference" else ROW_TOKENS

    def settle(self, tokenizer: Tokenizer, kind: str, sequences: Sequences) -> tuple[Sequences, str]:
        """Return what training takes of a row, and the row's fate: dropped, cut; "" where all that teaches is taken."""
        length = self.row(kind)
        if kind == "preference":
            return fit_pair(sequences, tokenizer, length)
        (ids, mask), *_ = sequences
        if kind == "chat":
            kept, fate = fit(mask, length)
            return [(ids[:kept], mask[:kept])] if kept else [], fate.replace("unanswered", "")
        if kind == "prompt":
            if length <= self.max_new_tokens:
                raise UserError(f"{self.told(kind)}: leaves no room for a prompt; raise the first or lower the second")
            return (sequences, "") if len(ids) <= length - self.max_new_tokens else ([], "dropped")
        return sequences, ""

    def told(self, kind: str) -> str:
        """Return the options that set the limits of a kind, and their values."""
        answer = f" --max_new_tokens {self.max_new_tokens}" if kind == "prompt" else ""
        return f"--sequence_length {self.row(kind)}{answer}"


@dataclass
class Findings:
    """What was found. `sizes`: positions that each conversation, side of a pair, prompt or document fills.

    `fates`: what became of the usable rows: cut, dropped, "" for whole; `longer`: texts that continue in a second row;
    `tokens`, `trained`: of what is left.
    """

    kind: str
    report: RowReport = field(default_factory=RowReport)
    sizes: list[int] = field(default_factory=list)
    tokens: int = 0
    trained: int = 0
    longer: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    trouble: str = ""

    def lines(self, limits: Limits) -> list[str]:
        """Return the findings for people."""
        lines = self.report.lines()
        if not self.sizes:
            return lines
        middle, high = np.percentile(self.sizes, (50, 90), method="higher")
        unused = self.report.unused_by_kind if self.kind == "text" else self.report.unused
        fates = {NOUNS[self.kind]: self.fates[""], "cut": self.fates["cut"], "dropped": self.fates["dropped"]}
        return [
            *lines,
            f"tokens of one: median {middle + 1:,}, 90 % up to {high + 1:,}, longest {max(self.sizes) + 1:,}",
            f"{limits.told(self.kind)}: {self._fate()}",
            f"{self.tokens:,} tokens" + f", {self.trained:,} of them trained on" * (self.kind != "prompt"),
            balance(self.report.rows, "rows", {**fates, **unused}),
        ]

    def _fate(self) -> str:
        cut, dropped = self.fates["cut"], self.fates["dropped"]
        if self.kind == "text":
            return f"{self.longer:,} documents are longer and continue in the next row; nothing is lost"
        if not cut and not dropped:
            return f"all {NOUNS[self.kind]} fit"
        shown = f"{cut:,} {CUT[self.kind]}; " if self.kind in CUT else ""
        return f"{shown}{dropped:,} of {self.report.accepted:,} {NOUNS[self.kind]} are longer and left out"


def check_source(source: Source, tokenizer: Tokenizer, limits: Limits) -> Findings:
    """Read and encode everything; in memory is no more than the lengths."""
    found = Findings(kind_of_source(source))
    items = (item for _, item in placed_items(source, found.kind, found.report))
    shown = tqdm(items, f"reading {source}", leave=False, disable=not sys.stderr.isatty())
    some: list[Any] = []
    try:
        for item in shown:
            some.append(item)
            if len(some) == ROWS_AT_ONCE:
                _look(found, tokenizer, some, limits)
                some = []
    except UserError as error:  # a file that breaks off: what was found before it is worth seeing
        found.trouble = str(error)
    _look(found, tokenizer, some, limits)
    if not found.sizes and not found.trouble:
        found.trouble = str(no_usable(source, found.report))
    return found


def _look(found: Findings, tokenizer: Tokenizer, items: list[Any], limits: Limits) -> None:
    """Count some rows, as the stage that reads them does."""
    for sequences in encode_items(tokenizer, found.kind, items):
        sizes = lengths(sequences)
        found.sizes += sizes
        found.longer += max(sizes) > limits.row(found.kind)
        used, fate = limits.settle(tokenizer, found.kind, sequences)
        found.fates[fate] += 1
        found.tokens += sum(len(ids) for ids, _ in used)
        found.trained += trained(used)


def kind_of_source(source: Source) -> str:
    """Return text, chat, preference or prompt: by the format, or by the first row that shows it."""
    if source.layout.format:
        return FORMATS[source.layout.format].kind
    if is_generated(source):
        return "prompt"
    path = Path(source.path)
    if not source.is_hub and (
        ".txt" in path.suffixes or (path.is_dir() and not Folder.read(path, SUFFIXES, source.split).files)
    ):
        return "text"
    rows = (row for _, row in islice(read_rows(source, "skip", RowReport()), ROWS_LOOKED_AT) if isinstance(row, dict))
    row = next(rows, {})
    if "chosen" in row and "rejected" in row:
        return "preference"
    if {"messages", "conversations", "instruction", "output"} & row.keys():
        return "chat"
    if any(question in row and answer in row for question, answer in COLUMNS):
        return "prompt"
    return "text" if "text" in row else "chat"


def placed_items(source: Source, kind: str, report: RowReport) -> Iterator[tuple[str, Any]]:
    """Yield (place, item) of every usable row: a text, a conversation, a `Preference`, a `Problem`; the others counted.

    Raises `UserError` for what cannot be read to its end, and for text of which there is none.
    """
    if kind == "text":  # as pretraining would keep it
        with tempfile.TemporaryDirectory() as folder, closing(Cleaner(report, Path(folder))) as cleaner:
            yield from (document for document in Corpus([source], report=report) if cleaner.accept(*document))
    elif is_generated(source):
        problems = open_problems(source)
        for number in range(len(problems)):
            report.rows, report.accepted = number + 1, number + 1
            yield f"{source} #{number + 1}", problems.problem(number, 0)
    else:
        converters = {"chat": to_messages, "preference": to_preference}
        layout = {"layout": source.layout, "notices": report.pending}
        convert = problem_reader(source) if kind == "prompt" else partial(converters[kind], **layout)
        yield from placed_rows(source, convert, "skip", report)


def encode_items(tokenizer: Tokenizer, kind: str, items: Sequence[Any]) -> list[Sequences]:
    """Return the token sequences of each item and what is trained on: of a problem only its prompt, which is not."""
    if kind == "text":
        encoded = tokenizer.encode_batch(list(items))
        return [[([*ids, tokenizer.eos_id], [1] * (len(ids) + 1))] for ids in encoded]
    if kind == "preference":
        sides = encode_chats(tokenizer, [side for pair in items for side in pair])
        answers = [(ids, last_answer(mask)) for ids, mask in sides]
        return [list(pair) for pair in zip(answers[::2], answers[1::2], strict=True)]
    if kind == "prompt":
        return [[(ids, [0] * len(ids))] for ids in encode_prompts(tokenizer, items)]
    return [[pair] for pair in encode_chats(tokenizer, items)]


def lengths(sequences: Sequences) -> list[int]:
    """Return how many positions of a row each sequence fills: its last token is only ever predicted."""
    return [len(ids) - 1 for ids, _ in sequences]


def trained(sequences: Sequences) -> int:
    """Return how many tokens of a row of data are trained on."""
    return int(sum(np.sum(mask) for _, mask in sequences))


def no_usable(source: Source, report: RowReport) -> UserError:
    """Return the error for a source of which no row is left."""
    return UserError(f"{source}: no usable row; {report.why_empty()}")
