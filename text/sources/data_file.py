"""One file of a source: its characters, its numbered lines, and what is done with rows that cannot be read."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any, ClassVar

from errors import UserError
from text.sources.row_report import RowError, RowReport

# After so many rows without text in the column, no later one is expected to have it.
COLUMN_TRIES = 100


class FileProblem(RowError):
    """Why a row, or all of a file behind it, cannot be read: the kind, the line, the problem and the remedy."""

    def __init__(self, kind: str, line: int | None, problem: str, remedy: str) -> None:
        super().__init__(kind, f"{problem}; {remedy}")
        self.line = line


@dataclass
class DataFile:
    """A file, or a data set on the Hub by its name, and how to read it.

    `column`: the one that holds the text, None where whole rows are read; `on_error`: "skip" counts rows that cannot be
    read in `report`, "stop" raises `UserError` at the first, and so does "refuse", where nobody has a choice. `header`:
    of a CSV file that has none. `position`: bytes read so far; `element`: the number of the current row in a list, 0
    where there is none.
    """

    # The longest row in characters, and so the most that a broken quote can swallow before it is noticed.
    ROW_LIMIT: ClassVar[int] = 4 << 20

    path: Path | str
    report: RowReport
    column: str | None = None
    on_error: str = "skip"
    encoding: str = "utf-8"
    header: list[str] | None = None
    position: int = field(default=0, init=False)
    element: int = field(default=0, init=False)
    _tries: int = field(default=0, init=False)

    def place(self, line: int | None) -> str:
        """Return where the current row begins, as it is printed in errors."""
        return f"{self.path}{f':{line}' if line else ''}{f': element {self.element}' if self.element else ''}"

    def bad(self, kind: str, line: int, problem: str, remedy: str) -> None:
        """Count a row that cannot be read, or stop at it."""
        self._count(FileProblem(kind, line, problem, remedy))

    def _count(self, problem: FileProblem) -> None:
        place = f"{self.path}:{problem.line}"
        if self.on_error != "skip":
            raise UserError(f"{place}: {problem}" + ", or pass --on_error skip" * (self.on_error == "stop"))
        self.report.rows += 1
        self.report.add_problem(place, problem)

    def usable(self, line: int, *texts: str) -> bool:
        """Return whether all texts are characters; if not, the row is counted."""
        if any("\0" in text for text in texts):
            self.bad("NUL byte", line, "the text holds a NUL byte", "delete such bytes with tr -d '\\000'")
            return False
        try:
            for text in texts:
                text.encode("utf-8")
        except UnicodeEncodeError:
            self.bad("undecodable", line, f"not {self.encoding.upper()}", self.conversion("GBK", "gb18030"))
            return False
        return True

    def text_of(self, row: Any, line: int) -> str | None:
        """Return the text in the column, "" for null; None, counted, where there is none.

        Raises `FileProblem` when none of the first `COLUMN_TRIES` rows has text there.
        """
        if not isinstance(row, dict):
            self.bad("not an object", line, f"{type(row).__name__} where an object is expected", "fix the row")
            return None
        value = row.get(self.column, self)
        if value is None or isinstance(value, str):
            self._tries = COLUMN_TRIES
            return (value or "") if not value or self.usable(line, value) else None
        what = f"column {self.column!r} holds {type(value).__name__}"
        problem = FileProblem("not text", line, what, "name a column of text")
        problem = self.no_column(list(row), line) if value is self else problem
        self._tries += 1
        if self._tries == COLUMN_TRIES:
            raise problem
        self._count(problem)
        return None

    def no_column(self, columns: list[str], line: int | None) -> FileProblem:
        """Return the problem of a file or row that has other columns."""
        names = ", ".join(repr(name) for name in columns) or "none"
        problem = f"no column {self.column!r}, the columns are: {names}"
        return FileProblem("no such column", line, problem, "name one of them: --column")

    def conversion(self, source: str, codec: str) -> str:
        """Return the remedy for a file in another encoding than UTF-8; only text to train on can be given one."""
        option = f", or pass encoding {codec}" if self.column else ""
        return f"convert it with iconv -f {source} -t UTF-8{option}"

    @contextmanager
    def open(self) -> Iterator[TextIOWrapper]:
        """Open the file's characters, unzipped; a byte that cannot be decoded becomes a lone surrogate.

        Lines end at \\n alone, so that their numbers are an editor's.
        """
        with open(self.path, "rb") as self._disk:
            stream: Any = gzip.GzipFile(fileobj=self._disk) if str(self.path).lower().endswith(".gz") else self._disk
            encoding = "utf-8-sig" if self.encoding == "utf-8" else self.encoding
            if self.encoding == "utf-8" and stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise FileProblem("undecodable", 1, "UTF-16, not UTF-8", self.conversion("UTF-16", "utf-16"))
            text = TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline="\n")
            try:
                yield text
            finally:
                text.detach()

    def mark(self) -> None:
        """Take down how far the file was read."""
        self.position = self._disk.tell()

    def lines(self, stream: TextIOWrapper) -> Iterator[tuple[int, str]]:
        """Yield numbered lines, each with its line end. A line above the limit is counted and passed over."""
        limit, number = self.ROW_LIMIT, 0
        while line := stream.readline(limit):
            number += 1
            if len(line) == limit and line[-1] != "\n":
                while (rest := stream.readline(limit)) and rest[-1] != "\n":
                    pass
                self.bad("too long", number, f"a line of {limit:,} characters or more", "break it into rows")
                continue
            if number % 256 == 0:
                self.mark()
            yield number, line
