"""The rows of a source, whatever holds them, each with its place: for data sets of small records such as conversations.

JSON, JSON lines, CSV, Parquet and Arrow files (the text formats also with .gz), folders of them, and the Hub. A row
that cannot be read or used is counted and shown; a file that cannot be read to its end stops the reading always, since
nothing tells how much is lost.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from errors import UserError
from text.sources.csv_rows import csv_rows
from text.sources.data_file import DataFile, FileProblem, suffix_of
from text.sources.folders import Folder
from text.sources.hub import hub_rows
from text.sources.json_rows import json_rows
from text.sources.registry import Source
from text.sources.row_report import RowError, RowReport, UnwantedRow
from text.sources.sampling import sample_by_count
from text.sources.table_rows import arrow_rows, parquet_rows, without_nulls

READERS: dict[str, Callable[[DataFile], Iterator[tuple[Any, int]]]] = {
    ".json": json_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
SUFFIXES = tuple(READERS)

Item = TypeVar("Item")


def row_files(source: Source, report: RowReport | None = None) -> list[Path]:
    """The file itself, or the files of rows in and below a folder, sorted. Raises `UserError` when there is none.

    What is left out for being of another split is a notice of the report.
    """
    path = Path(source.path)
    if path.is_dir():
        folder = Folder.read(path, SUFFIXES, source.split)
        if not folder.files:
            raise UserError(f"{path}: the folder has no {', '.join(SUFFIXES)} file; name a file or another folder")
        if report and (notice := folder.notice()):
            report.unread.append(notice)
        return folder.files
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    if suffix_of(path) not in SUFFIXES:
        raise UserError(f"{path}: rows are read from {', '.join(SUFFIXES)} files; convert it")
    return [path]


def source_bytes(source: Source) -> int:
    """The bytes of a source's files; 0 for the Hub."""
    return 0 if source.is_hub else sum(file.stat().st_size for file in row_files(source))


def converted_rows(
    source: Source | str | Path, convert: Callable[[object], Item], on_error: str, report: RowReport
) -> Iterator[Item]:
    """What `convert` makes of each row of a source, in order; with `samples`, of so many of those that it can use.

    A row for which `convert` raises `RowError` is counted in `report` (`on_error="skip"`) or raises `UserError`
    (`on_error="stop"`).
    """
    for _, item in placed_rows(source, convert, on_error, report):
        yield item


def placed_rows(
    source: Source | str | Path, convert: Callable[[object], Item], on_error: str, report: RowReport
) -> Iterator[tuple[str, Item]]:
    """`converted_rows`, each with the place of its row."""
    if on_error not in ("skip", "stop"):
        raise UserError(f"--on_error {on_error}: must be 'skip' or 'stop'")
    source = Source.of(source)
    items = _converted(source, convert, on_error, report)
    if source.samples is None:
        yield from items
        return
    before = report.kept
    chosen = sample_by_count(items, source.samples, source.seed)
    report.left_out += report.kept - before - len(chosen)
    report.kept = before + len(chosen)
    yield from chosen


def read_rows(source: Source, on_error: str, report: RowReport) -> Iterator[tuple[str, object]]:
    """(place, row) of each row of a source; those that cannot be read are counted, or with "stop" raise `UserError`.

    Raises `UserError` for a file that cannot be read to its end.
    """
    if source.is_hub:
        try:
            for number, row in enumerate(hub_rows(source), start=1):
                yield f"{source.path}:{number}", without_nulls(row)
        except FileProblem as problem:
            raise UserError(f"{source.path}: {problem}; {problem.remedy}") from problem
        return
    for file in row_files(source, report):
        try:
            yield from _rows_of_file(file, on_error, report)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file}: cannot be read ({error}); fetch or mend it") from error


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
                raise UserError(f"{place}: {error}; mend or drop the row or pass --on_error skip") from error
            report.add_problem(place, error)
            continue
        report.kept += 1
        report.settle_notices(place)
        yield place, item


def _rows_of_file(path: Path, on_error: str, report: RowReport) -> Iterator[tuple[str, object]]:
    before, problems, is_empty = report.bytes_read, report.problems.total(), True
    file = DataFile(path, None, "utf-8", _Counted(report, on_error))
    try:
        for row, line in READERS[suffix_of(path)](file):
            is_empty = False
            yield f"{path}:{line}" + (f": element {file.element}" if file.element else ""), row
            report.bytes_read = before + file.position
    except FileProblem as problem:
        place = f"{path}:{problem.line}" if problem.line else str(path)
        raise UserError(f"{place}: {problem}; {_possible(problem.remedy)}") from problem
    if is_empty and report.problems.total() == problems:
        raise UserError(f"{path}: is empty; name a file that has rows")


@dataclass
class _Counted:
    """What the readers that pretraining's corpora share cannot read, counted in a `RowReport`."""

    report: RowReport
    on_error: str

    def bad(self, kind: str, file: Path, line: int, problem: str, remedy: str) -> None:
        if self.on_error == "stop":
            raise UserError(f"{file}:{line}: {problem}; {_possible(remedy)}, or pass --on_error skip")
        self.report.rows += 1
        self.report.add_problem(f"{file}:{line}", RowError(kind, f"{problem}; {_possible(remedy)}"))

    def drop(self, kind: str, file: Path, line: int) -> None:
        """Blank lines are no rows."""


def _possible(remedy: str) -> str:
    """The remedy without the encoding that only text can be given."""
    return remedy.partition(", or pass encoding")[0]
