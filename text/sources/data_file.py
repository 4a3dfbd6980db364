"""One file of a corpus: its characters, its numbered lines, and where its unreadable rows are counted."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

from text.corpus.cleaning import Report

# The longest row in characters, and so the most that a broken quote can swallow before it is noticed.
ROW_LIMIT = 4 << 20
# After so many rows without the wanted column, no later one is expected to have it.
COLUMN_TRIES = 100
# Formats that may be packed with gzip, .gz behind their own suffix.
ZIPPED = (".csv", ".json", ".jsonl", ".ndjson", ".txt")
# What `save_to_disk` and the Hub write beside the data, and LLaMA-Factory's registry.
METADATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")

Row = tuple[str, int]
"""A document's text and the number, counted from 1, of the line or table row at which it begins."""


def suffix_of(path: Path) -> str:
    """In lower case, and without .gz where the format may be packed: what says how a file is read."""
    suffix, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    return inner if suffix == ".gz" and inner in ZIPPED else suffix


class FileProblem(Exception):
    """Why a file cannot be read any further: the kind it is counted under, the line, the problem and the remedy."""

    def __init__(self, kind: str, line: int | None, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.kind, self.line, self.problem, self.remedy = kind, line, problem, remedy


@dataclass
class DataFile:
    """A file, or a data set on the Hub by its name, and how to read it.

    `column` is the one that documents are taken from, None where whole rows are read; `position`: bytes read so far;
    `element`: the number of the row in a list, 0 where there is none.
    """

    path: Path | str
    column: str | None
    encoding: str
    report: Report
    row_limit: int = ROW_LIMIT
    position: int = field(default=0, init=False)
    element: int = field(default=0, init=False)
    _tries: int = field(default=0, init=False)

    def bad(self, kind: str, line: int, problem: str, remedy: str) -> None:
        """Count a row that cannot be read. Raises `UserError` with `on_error="stop"`."""
        self.report.bad(kind, self.path, line, problem, remedy)

    def usable(self, text: str, line: int) -> bool:
        """Whether the text is characters; if not, it is counted."""
        if "\0" in text:
            self.bad("NUL byte", line, "the text holds a NUL byte", "delete such bytes with tr -d '\\000'")
            return False
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            self.bad("undecodable", line, f"not {self.encoding.upper()}", conversion("GBK", "gb18030"))
            return False
        return True

    def text_of(self, row: Any, line: int) -> Iterator[Row]:
        """The wanted field of a JSON object or a row of the Hub; nothing, counted, when it has no text.

        Raises `FileProblem` when none of the first `COLUMN_TRIES` rows has the column.
        """
        if not isinstance(row, dict):
            self.bad("not an object", line, f"{type(row).__name__} where an object is expected", "mend the row")
        elif self.column not in row:
            problem = self.no_column(list(row), line)
            self._tries += 1
            if self._tries == COLUMN_TRIES:
                raise problem
            self.bad(problem.kind, line, problem.problem, problem.remedy)
        else:
            self._tries = COLUMN_TRIES
            text = "" if row[self.column] is None else row[self.column]
            if not isinstance(text, str):
                problem = self.not_text(type(text).__name__, line)
                self.bad(problem.kind, line, problem.problem, problem.remedy)
            elif self.usable(text, line):
                yield text, line

    def no_column(self, columns: list[str], line: int | None) -> FileProblem:
        """The problem of a file or row that has other columns."""
        names = ", ".join(repr(name) for name in columns) or "none"
        problem = f"no column {self.column!r}, the columns are: {names}"
        return FileProblem("no such column", line, problem, "name one of them as column")

    def not_text(self, kind: str, line: int | None) -> FileProblem:
        """The problem of a column or field that holds something else."""
        return FileProblem("not text", line, f"column {self.column!r} holds {kind}", "name a column of text")

    @contextmanager
    def open(self) -> Iterator[TextIOWrapper]:
        """The file's characters, unzipped; a byte that cannot be decoded becomes a lone surrogate.

        Lines end at \\n alone, so that their numbers are an editor's.
        """
        with open(self.path, "rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if str(self.path).lower().endswith(".gz") else raw
            head = stream.peek(4)[:4]
            encoding = self.encoding
            if encoding == "utf-8":
                encoding = "utf-8-sig"
                if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise FileProblem("undecodable", 1, "UTF-16, not UTF-8", conversion("UTF-16", "utf-16"))
            text = TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline="\n")
            try:
                yield text
            finally:
                text.detach()

    def lines(self, stream: TextIOWrapper) -> Iterator[tuple[int, str]]:
        """Numbered lines, each with its line end. A line above the limit is counted and passed over."""
        limit, raw, number = self.row_limit, disk_file(stream), 0
        while line := stream.readline(limit):
            number += 1
            if len(line) == limit and line[-1] != "\n":
                while (rest := stream.readline(limit)) and rest[-1] != "\n":
                    pass
                self.bad("too long", number, f"a line of {limit:,} characters or more", "break it into rows")
                continue
            if number % 256 == 0:
                self.position = raw.tell()
            yield number, line


def conversion(source: str, codec: str) -> str:
    """The remedy for a file in another encoding than UTF-8."""
    return f"convert it with iconv -f {source} -t UTF-8, or pass encoding {codec}"


def disk_file(stream: TextIOWrapper) -> BinaryIO:
    """The file below the decoding and unzipping layers, whose position is in bytes of the disk."""
    buffer: Any = stream.buffer
    return buffer.fileobj if isinstance(buffer, gzip.GzipFile) else buffer
