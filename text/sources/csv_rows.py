"""How a CSV file becomes rows: a column name -> text each, with its line; one broken row costs only itself."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator

from text.sources.data_file import DataFile, FileProblem

# The line that Excel reads, and writes no more, before the header.
SEPARATOR = re.compile(r'"?sep=([^"\r\n])"?\s*', re.IGNORECASE)


def csv_rows(file: DataFile) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line at which each row begins, and the row, of a file quoted as RFC 4180 has it, with a header line.

    Before the header, a line such as `sep=;` may name the separator, as Excel has it.
    A quote that is not closed would make one row of all that follows. Strict parsing notices it at the next quote, at
    the row limit or at the end of the file; then only the row's first line is given up and reading resumes with the
    second. Raises `FileProblem` when the header is broken or lacks the column.
    """
    csv.field_size_limit(file.ROW_LIMIT)  # the module's own limit, 131,072, is less than an honest long document
    with file.open() as stream:
        feed = _RowFeed(file.lines(stream))
        separator = SEPARATOR.fullmatch(next(feed, ""))
        if not separator:
            feed.give_back(0)
        rows = csv.reader(feed, strict=True, delimiter=separator[1] if separator else ",")
        header = file.header
        while True:
            feed.row = []
            try:
                fields, error = next(rows), None
            except StopIteration:
                return
            except csv.Error as found:
                fields, error = [], found
            line = feed.row[0][0]
            if header is None:
                header = fields
                _check_header(file, feed, header, error)
            elif error is not None:
                _count_broken(file, feed, error)
                feed.give_back(1)
            elif fields and len(fields) != len(header):
                problem = f"{len(fields)} fields where the header has {len(header)}"
                file.bad("field count", line, problem, "put text with commas or quotes in quotes")
                feed.give_back(1)
            elif fields and (file.column is not None or file.usable(line, *fields)):
                yield line, dict(zip(header, fields, strict=True))


class _RowFeed:
    """The lines that csv.reader asks for; remembers those of the current row, to give them back."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines
        self._returned: deque[tuple[int, str]] = deque()
        self.row: list[tuple[int, str]] = []

    def give_back(self, after: int) -> None:
        """Read the lines of the row again, but for the first `after`."""
        self._returned.extendleft(reversed(self.row[after:]))

    def __iter__(self) -> _RowFeed:
        return self

    def __next__(self) -> str:
        numbered = self._returned.popleft() if self._returned else next(self._lines)
        self.row.append(numbered)
        return numbered[1]


def _check_header(file: DataFile, feed: _RowFeed, header: list[str], error: csv.Error | None) -> None:
    if "\0" in feed.row[-1][1]:
        raise FileProblem("undecodable", 1, "NUL bytes, as UTF-16 has them", file.conversion("UTF-16LE", "utf-16-le"))
    if error is not None:
        raise FileProblem("broken header", feed.row[0][0], f"no CSV header ({error})", "begin with column names")
    if file.column is not None and file.column not in header:
        raise file.no_column(header, feed.row[0][0])


def _count_broken(file: DataFile, feed: _RowFeed, error: csv.Error) -> None:
    line = feed.row[0][0]
    if "\0" in feed.row[-1][1]:  # refused by the csv module itself before Python 3.11
        file.usable(line, "\0")
    elif "new-line" in str(error):
        file.bad("stray carriage return", line, "a carriage return in the row", "quote the text or end lines with \\n")
    else:
        file.bad("broken quote", line, "a quote that is not closed or not doubled", 'write " inside quotes as ""')
