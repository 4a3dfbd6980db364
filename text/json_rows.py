"""Rows of JSON and JSONL files with the place of each, for data sets of small records such as conversations.

A file is a JSON array or has one JSON value a line; which of them is seen from its content, not from its name.
"""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from errors import UserError
from text.row_report import RowError, RowReport


def json_rows(file: Path, report: RowReport) -> Iterator[tuple[str, object]]:
    """(place, parsed row or `RowError`) of each row of a file; blank lines are no rows.

    Raises `UserError` for a file that is empty or UTF-16 and for an array that cannot be read to its end.
    """
    with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as stream:
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
    number, line = 0, text.count("\n", 0, position) + 1
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
            broken = text.count("\n", 0, getattr(error, "pos", position)) + 1
            raise UserError(
                f"{file}:{broken}: the JSON array breaks off in element {number} ({error}); mend it, or write one "
                "row a line (.jsonl), where a broken line costs only itself"
            ) from error
        report.bytes_read += len(content) * (position - begin) // len(text)
        yield f"{file}:{line}: element {number}", row
        line += text.count("\n", begin, position)
    if number == 0:
        raise UserError(f"{file}: the array is empty; name a file that has rows")
    if text[position + 1 :].strip():
        line = text.count("\n", 0, position) + 1
        raise UserError(f"{file}:{line}: text follows the end of the JSON array; remove it")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
