"""Rows of JSON and JSONL files with the place of each, for data sets of small records such as conversations.

A file is a JSON array or has one JSON value a line; which of them is seen from its content, not from its name.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from errors import UserError

SUFFIXES = (".json", ".jsonl", ".ndjson")
EXAMPLES_SHOWN = 3

Row = TypeVar("Row")


class RowError(Exception):
    """A row that cannot be used: the kind, for counting, and what is wrong with this one."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


@dataclass
class RowReport:
    """What was read. `rows` = `kept` + all `problems`; `examples` holds the first few of each kind."""

    rows: int = 0
    kept: int = 0
    bytes_read: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add_problem(self, place: str, error: RowError) -> None:
        self.problems[error.kind] += 1
        examples = self.examples.setdefault(error.kind, [])
        if len(examples) < EXAMPLES_SHOWN:
            examples.append(f"{place}: {error}")

    def lines(self) -> list[str]:
        """The report for people: one line of totals, then each kind of problem with its first examples."""
        lines = [f"{self.kept} of {self.rows} rows read, {self.problems.total()} skipped"]
        for kind, count in self.problems.most_common():
            lines.append(f"  {count} x {kind}")
            lines += [f"    {example}" for example in self.examples[kind]]
        return lines

    def why_empty(self) -> str:
        """One line of reasons why no row was kept."""
        counts = ", ".join(f"{count} x {kind}" for kind, count in self.problems.most_common())
        first = next((examples[0] for examples in self.examples.values()), "name a file")
        return f"{self.rows} rows, all skipped: {counts}; the first: {first}"


def json_files(path: str | Path) -> list[Path]:
    """The file itself, or the JSON files in and below a folder, sorted. Raises `UserError` when there is none."""
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{path}: the folder has no {', '.join(SUFFIXES)} file; name a file or another folder")
        return files
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: rows are read from {', '.join(SUFFIXES)} files; convert it")
    return [path]


def kind_of(value: object) -> str:
    """What a JSON value is, in words for an error message."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "missing" if value is None else names.get(type(value), type(value).__name__)


def json_rows(file: Path, report: RowReport) -> Iterator[tuple[str, object]]:
    """(place, parsed row or `RowError`) of each row of a file; blank lines are no rows.

    Raises `UserError` for a file that is empty or UTF-16 and for an array that cannot be read to its end.
    """
    with file.open("rb") as stream:
        head = stream.read(4)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{file}: is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
        stream.seek(3 if head.startswith(codecs.BOM_UTF8) else 0)
        begin = stream.tell()
        first = next((line for line in stream if line.strip()), None)
        if first is None:
            raise UserError(f"{file}: is empty; name a file that has rows")
        stream.seek(begin)
        if _begins_array(first):
            yield from _array_rows(file, stream.read(), report)
        else:
            for number, line in enumerate(stream, start=1):
                report.bytes_read += len(line)
                if line.strip():
                    yield f"{file}:{number}", _parse_line(line)


def converted_rows(
    path: str | Path, convert: Callable[[object], Row], on_error: str, report: RowReport
) -> Iterator[Row]:
    """What `convert` makes of each row of a file, or of all JSON files in a folder, in order.

    A row for which `convert` raises `RowError` is counted in `report` (`on_error="skip"`) or raises `UserError`
    (`on_error="stop"`).
    """
    if on_error not in ("skip", "stop"):
        raise UserError(f"--on_error {on_error}: must be 'skip' or 'stop'")
    for file in json_files(path):
        for place, row in json_rows(file, report):
            report.rows += 1
            try:
                if isinstance(row, RowError):
                    raise row
                converted = convert(row)
            except RowError as error:
                if on_error == "stop":
                    raise UserError(f"{place}: {error}; mend or drop the row or pass --on_error skip") from error
                report.add_problem(place, error)
                continue
            report.kept += 1
            yield converted


def _begins_array(first_line: bytes) -> bool:
    """Whether the file is one array of rows; a line that is a list of messages is a conversation of its own."""
    text = first_line.decode("utf-8", "replace").lstrip()
    if not text.startswith("["):
        return False
    try:
        first, _ = json.JSONDecoder().raw_decode(text, _skip_space(text, 1))
    except (ValueError, RecursionError):
        return True
    return not (isinstance(first, dict) and ("role" in first or "from" in first))


def _parse_line(line: bytes) -> object:
    try:
        text = line.decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
        return RowError("not UTF-8", f"{byte} is not UTF-8; if it is GBK, convert it: iconv -f GBK -t UTF-8")
    if "\0" in text:
        return RowError("NUL character", "the line has NUL bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return RowError("broken JSON", f"broken JSON ({error})")


def _array_rows(file: Path, content: bytes, report: RowReport) -> Iterator[tuple[str, object]]:
    """The elements of one JSON array, parsed one at a time so that an error has its element and line."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}:{line}: byte 0x{content[error.start]:02x} is not UTF-8; if it is GBK, convert it: "
            "iconv -f GBK -t UTF-8"
        ) from error
    decoder = json.JSONDecoder()
    position = _skip_space(text, text.index("[") + 1)
    number = 0
    while not text.startswith("]", position):
        number += 1
        begin = position
        try:
            row, position = decoder.raw_decode(text, position)
            position = _skip_space(text, position)
            if text.startswith(",", position):
                position = _skip_space(text, position + 1)
            elif not text.startswith("]", position):
                raise ValueError("no ',' or ']' after the element")
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, getattr(error, "pos", position)) + 1
            raise UserError(
                f"{file}:{line}: the JSON array breaks off in element {number} ({error}); mend it, or write one "
                "row a line (.jsonl), where a broken line costs only itself"
            ) from error
        report.bytes_read += len(content) * (position - begin) // len(text)
        yield f"{file}: element {number}", row
    if number == 0:
        raise UserError(f"{file}: the array is empty; name a file that has rows")
    if text[position + 1 :].strip():
        line = text.count("\n", 0, position) + 1
        raise UserError(f"{file}:{line}: text follows the end of the JSON array; remove it")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
