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
from text.chats.encoded import ROWS_AT_ONCE, fit, last_answer
from text.chats.preferences import to_preference
from text.chats.problems import COLUMNS, is_generated, open_problems, problem_reader
from text.corpus.corpus import Cleaner, Corpus
from text.sources.folders import Folder
from text.sources.formats import FORMATS
from text.sources.registry import Source
from text.sources.row_report import RowReport, balance
from text.sources.rows import SUFFIXES, placed_rows, read_rows
from text.tokenizer import Tokenizer

ROWS_LOOKED_AT = 100
NOUNS = {"text": "documents", "chat": "conversations", "preference": "pairs", "prompt": "prompts"}

Sequences = list[tuple[Sequence[int], Sequence[int]]]
"""The token sequences of one row, each (ids, mask)."""


@dataclass
class Findings:
    """What was found. `sizes`: positions that each conversation, side of a pair, prompt or document fills.

    `fates`: what became of the usable rows: whole, cut, dropped; `longer`: those that do not fit, which text survives.
    """

    kind: str
    report: RowReport = field(default_factory=RowReport)
    sizes: list[int] = field(default_factory=list)
    trained: int = 0
    longer: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    trouble: str = ""

    def lines(self, sequence_length: int) -> list[str]:
        """Return the findings for people."""
        lines = self.report.lines()
        if not self.sizes:
            return lines
        middle, high = np.percentile(self.sizes, (50, 90), method="higher")
        tokens = sum(self.sizes) + len(self.sizes)
        unused = self.report.unused_by_kind if self.kind == "text" else self.report.unused
        fates = {NOUNS[self.kind]: self.fates["whole"], "cut": self.fates["cut"], "dropped": self.fates["dropped"]}
        return [
            *lines,
            f"{tokens:,} tokens, {self.trained:,} of them trained on",
            f"tokens of one: median {middle + 1:,}, 90 % up to {high + 1:,}, longest {max(self.sizes) + 1:,}",
            f"sequence_length {sequence_length}: {self._fate()}",
            balance(self.report.rows, "rows", {**fates, **unused}),
        ]

    def _fate(self) -> str:
        cut, dropped = self.fates["cut"], self.fates["dropped"]
        if self.kind == "text":
            return f"{self.longer:,} documents are longer and continue in the next row; nothing is lost"
        if not cut and not dropped:
            return f"all {NOUNS[self.kind]} fit"
        shown = f"{cut:,} cut after the last answer that fits, " if self.kind == "chat" else ""
        return f"{shown}{dropped:,} of {self.report.accepted:,} {NOUNS[self.kind]} left out"


def check_source(source: Source, tokenizer: Tokenizer, sequence_length: int) -> Findings:
    """Read and encode everything; in memory is no more than the lengths."""
    found = Findings(kind_of_source(source))
    items = (item for _, item in placed_items(source, found.kind, found.report))
    shown = tqdm(items, f"reading {source}", leave=False, disable=not sys.stderr.isatty())
    some: list[Any] = []
    try:
        for item in shown:
            some.append(item)
            if len(some) == ROWS_AT_ONCE:
                _look(found, tokenizer, some, sequence_length)
                some = []
    except UserError as error:  # a file that breaks off: what was found before it is worth seeing
        found.trouble = str(error)
    _look(found, tokenizer, some, sequence_length)
    if not found.sizes and not found.trouble:
        found.trouble = str(no_usable(source, found.report))
    return found


def _look(found: Findings, tokenizer: Tokenizer, items: list[Any], sequence_length: int) -> None:
    """Count some rows, as the stage that reads them does."""
    for sequences in encode_items(tokenizer, found.kind, items):
        sizes = lengths(sequences)
        found.sizes += sizes
        found.trained += trained(sequences)
        is_longer = max(sizes) > sequence_length
        found.longer += is_longer
        fate = "dropped" if is_longer and found.kind != "text" else "whole"
        if found.kind == "chat":
            _, lost = fit(sequences[0][1], sequence_length)
            fate = lost if lost in ("cut", "dropped") else "whole"
        found.fates[fate] += 1


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
        questions = [[{"role": "user", "content": problem.question}] for problem in items]
        return [[pair] for pair in encode_chats(tokenizer, questions, add_generation_prompt=True)]
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
