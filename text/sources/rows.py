"""The one way in: (place, row) of every row of a source, whatever holds it; the place is the one printed in errors.

JSON, JSON lines, CSV, Parquet and Arrow files, folders of them, and the Hub give whole rows (`read_rows`), which
`placed_rows` converts; with a column, and from plain text too, they give that column's text (`rows_of`). Local files
are not read with `datasets`: there one broken quote or byte ends a whole file, and no row has a line.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

from errors import UserError
from text.order import scramble
from text.sources.data_file import DataFile, FileProblem
from text.sources.folders import READERS, SUFFIXES, row_files, suffix_of
from text.sources.registry import Source
from text.sources.row_report import RowError, RowReport, UnwantedRow

Item = TypeVar("Item")


def read_rows(source: Source, on_error: str, report: RowReport) -> Iterator[tuple[str, object]]:
    """Yield (place, row) of each row; those that cannot be read are counted, or with "stop" raise `UserError`.

    Raises `UserError` for a file that cannot be read to its end, since nothing shows how much is lost.
    """
    files = row_files(source, SUFFIXES, report)
    return rows_of((DataFile(path, report, on_error=on_error) for path in files), source)


def every_row(source: Source) -> Iterator[tuple[str, object]]:
    """Yield (place, row) of each row. Raises `UserError` for a file or a row that cannot be read."""
    return read_rows(source, "refuse", RowReport())


def rows_of(files: Iterable[DataFile], source: Source) -> Iterator[tuple[str, Any]]:
    """Do as `read_rows` of some files; with a column, yield its text, and count a file that breaks off."""
    for file in files:
        report, before = file.report, file.report.bytes_read
        try:
            yield from _rows_of_file(file, source)
        except FileProblem as problem:
            place = f"{file.path}:{problem.line}" if problem.line else str(file.path)
            if file.column is None:
                raise UserError(f"{place}: {problem}") from problem
            if file.on_error == "stop":
                raise UserError(f"{place}: {problem}, or skip and count it with --on_error skip") from problem
            report.add_file(place, problem)
        report.bytes_read = before + (file.path.stat().st_size if isinstance(file.path, Path) else 0)


def placed_rows(
    source: Source | str | Path, convert: Callable[[object], Item], on_error: str, report: RowReport
) -> Iterator[tuple[str, Item]]:
    """Yield the place of each row and what `convert` makes of it; with `samples`, of so many of those it can use.

    A row for which `convert` raises `RowError` is counted in `report` (`on_error="skip"`) or raises `UserError`
    (`on_error="stop"`).
    """
    source = Source.of(source)
    items = _converted(source, convert, on_error, report)
    if source.samples is not None:
        before = report.accepted
        items = sample_by_count(items, source.samples, source.seed)
        report.left_out += report.accepted - before - len(items)
        report.accepted = before + len(items)
    yield from items


def sample_by_count(items: Iterable[Item], count: int, seed: int = 0) -> list[Item]:
    """Return `count` of the items, or all when there are fewer, in their order; each has the same chance.

    Taken are those whose seed and number scramble to the lowest values, so that what is added at the end of the data
    replaces few of them. In memory is the sample alone.
    """
    taken: list[tuple[int, int, Item]] = []  # a heap with the highest draw first
    for number, item in enumerate(items):
        entry = (-scramble(seed, number), number, item)
        if len(taken) < count:
            heapq.heappush(taken, entry)
        elif entry > taken[0]:
            heapq.heapreplace(taken, entry)
    return [item for _, _, item in sorted(taken, key=lambda entry: entry[1])]


def _converted(
    source: Source, convert: Callable[[object], Item], on_error: str, report: RowReport
) -> Iterator[tuple[str, Item]]:
    for place, row in read_rows(source, on_error, report):
        report.rows += 1
        report.pending.clear()
        try:
            item = convert(row)
        except RowError as error:
            if on_error == "stop" and not isinstance(error, UnwantedRow):
                raise UserError(f"{place}: {error}; fix or drop the row or pass --on_error skip") from error
            report.add_problem(place, error)
            continue
        report.accepted += 1
        report.settle_notices(place)
        yield place, item


def _rows_of_file(file: DataFile, source: Source) -> Iterator[tuple[str, Any]]:
    """Yield (place, row), or with a column (place, text). Raises `FileProblem` for what ends the reading early."""
    report, before, is_empty = file.report, file.report.bytes_read, True
    problems = report.problems.total()
    if source.is_hub:
        rows = resolve_name("text.sources.table_rows:hub_rows")(file, source)
    else:
        rows = resolve_name(READERS[suffix_of(Path(file.path))])(file)
    try:
        for line, row in rows:
            is_empty = False
            if file.column is None or (row := file.text_of(row, line)) is not None:
                yield file.place(line), row
            report.bytes_read = before + file.position
    except UnicodeError as error:
        raise FileProblem("undecodable", None, str(error), "name the encoding it has") from error
    except (OSError, EOFError, zlib.error) as error:
        raise FileProblem("unreadable file", None, f"cannot be read ({error})", "fetch or fix it") from error
    if is_empty and report.problems.total() == problems:
        raise FileProblem("empty file", None, "is empty", "name a file that has rows")
