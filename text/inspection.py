"""Any source as its stage would see it: which kind of data it is, its rows with their places, and their tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError
from text.chats.chat_template import encode_chats
from text.chats.conversations import to_messages
from text.chats.encoded import last_answer
from text.chats.preferences import to_preference
from text.chats.problems import COLUMNS, is_generated, open_problems, problem_reader
from text.corpus.corpus import Cleaner, Corpus
from text.sources.folders import Folder
from text.sources.formats import FORMATS
from text.sources.registry import Source
from text.sources.row_report import RowReport
from text.sources.rows import SUFFIXES, placed_rows, read_rows
from text.tokenizer import Tokenizer

ROWS_LOOKED_AT = 100

Sequences = list[tuple[Sequence[int], Sequence[int]]]
"""The token sequences of one row, each (ids, mask)."""


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
    for _, row in islice(read_rows(source, "skip", RowReport()), ROWS_LOOKED_AT):
        if isinstance(row, dict):
            return _kind_of_row(row)
    return "chat"


def placed_items(source: Source, kind: str, report: RowReport) -> Iterator[tuple[str, Any]]:
    """Yield (place, item) of every usable row: a text, a conversation, a `Preference`, a `Problem`; the others counted.

    Raises `UserError` for what cannot be read to its end, and for text of which there is none.
    """
    if kind == "text":
        yield from _documents(source, report)
    elif is_generated(source):
        problems = open_problems(source)
        for number in range(len(problems)):
            report.rows, report.kept = number + 1, number + 1
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


def _documents(source: Source, report: RowReport) -> Iterator[tuple[str, str]]:
    """Yield the documents that pretraining would keep."""
    with tempfile.TemporaryDirectory() as folder, closing(Cleaner(report, Path(folder))) as cleaner:
        yield from (document for document in Corpus([source], report=report) if cleaner.accept(*document))


def _kind_of_row(row: dict) -> str:
    if "chosen" in row and "rejected" in row:
        return "preference"
    if {"messages", "conversations", "instruction", "output"} & row.keys():
        return "chat"
    if any(question in row and answer in row for question, answer in COLUMNS):
        return "prompt"
    return "text" if "text" in row else "chat"


def no_usable(source: Source, report: RowReport) -> UserError:
    """Return the error for a source of which no row is left."""
    return UserError(f"{source}: no usable row; {report.why_empty()}")
