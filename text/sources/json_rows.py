"""Rows of JSON files of any size, with line numbers, in bounded memory.

A file has one value a line (JSON lines), a list of values, an object with such a list in it, or values that go over
several lines: pretty-printed rows, or a single object. Its content shows which of these, not its name.
NaN, which Python and pandas write although JSON has no such number, is null.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Any

from text.sources.data_file import DataFile, FileProblem

CHUNK = 1 << 20
# What an object calls the list of its rows: SQuAD and many exports, and LMFlow.
LISTS = ("data", "instances")
BETWEEN = re.compile(r"[\s,]*")
DECODER = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))
# An error this near to the end may be one of what was read, not of the file: -Infinity is the longest bare word.
WORD = 9


def json_rows(file: DataFile) -> Iterator[tuple[int, Any]]:
    """Yield the line at which each value begins, and the value; `file.element` is its number in a list.

    Raises `FileProblem` where anything but JSON lines breaks: nothing shows where the next value would begin.
    """
    with file.open() as stream:
        begin = _first_value(stream.read(file.ROW_LIMIT))
    with file.open() as stream:
        values = _lines(file, stream) if begin is None else _values(file, stream, *begin)
        for line, value, text in values:
            # The other columns of a text to train on may be what they like.
            if file.column is not None or file.usable(line, text):
                yield line, value


def _first_value(head: str) -> tuple[int, str] | None:
    """Return where the values begin, in characters, and what closes them, "" for the end; None for JSON lines.

    head: the beginning of the file.
    """
    text = head.lstrip()
    start = len(head) - len(text)
    first, _, following = text.partition("\n")
    first, following = first.rstrip(), following.lstrip()
    if first.startswith("["):
        return None if _is_conversation(first) else (start + 1, "]")
    spans = _continues(first, following)
    if not first.startswith("{") or (following and not spans):
        return None
    place = _list_within(head, start)
    if place is not None:
        return place, "]}"
    return (start, "") if spans else None


def _is_conversation(line: str) -> bool:
    """Return whether a line that begins with [ is a row, a list of messages, and not the start of a list of rows."""
    try:
        first, _ = DECODER.raw_decode(line, BETWEEN.match(line, 1).end())
    except (ValueError, RecursionError):
        return False
    return _is_message(first)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _continues(line: str, following: str) -> bool:
    """Return whether a line's value continues in what follows: a line of JSON lines may be cut short too."""
    try:
        DECODER.decode(line)
    except json.JSONDecodeError as error:
        return bool(following) and error.pos >= len(line) - 1 and (line[-1] in "[:" or following[0] != "{")
    except (ValueError, RecursionError):
        pass
    return False


def _list_within(text: str, place: int) -> int | None:
    """Return where, in an object, the list of its rows begins; None where it has none within the text."""
    try:
        while True:
            name, place = DECODER.raw_decode(text, BETWEEN.match(text, place + 1).end())
            place = BETWEEN.match(text, text.index(":", place) + 1).end()
            if name in LISTS and text.startswith("[", place):
                row, _ = DECODER.raw_decode(text, BETWEEN.match(text, place + 1).end())
                if isinstance(row, dict) and not _is_message(row):
                    return place + 1
            _, place = DECODER.raw_decode(text, place)
            place = BETWEEN.match(text, place).end() - 1
    except (ValueError, RecursionError):
        return None


def _lines(file: DataFile, stream: TextIOWrapper) -> Iterator[tuple[int, Any, str]]:
    """Yield (line, value, its text) of each line that is not blank. One that is not JSON is counted."""
    for line, text in file.lines(stream):
        if text.isspace():
            continue
        try:
            value = DECODER.decode(text.rstrip())
        except (ValueError, RecursionError) as error:
            if file.usable(line, text):
                file.bad("broken JSON", line, f"broken JSON ({error})", "fix or delete the line")
            continue
        yield line, value, text


def _values(file: DataFile, stream: TextIOWrapper, place: int, closed: str) -> Iterator[tuple[int, Any, str]]:
    """Yield the same of each value from a place on, one at a time, up to what closes them."""
    text = stream.read(max(CHUNK, place + 1))
    line = 1 + text.count("\n", 0, place)
    while True:
        start = BETWEEN.match(text, place).end()
        line += text.count("\n", place, start)
        place, cut = start, True
        problem, broken = "it is not closed", place
        if place < len(text):
            if closed and text[place] == "]":
                break
            try:
                value, end = DECODER.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                problem, broken = str(error).split(": line")[0], getattr(error, "pos", place)
                cut = broken >= len(text) - WORD or "Unterminated" in problem
            else:
                file.element += bool(closed)
                yield line, value, text[place:end]
                line += text.count("\n", place, end)
                place = end
                continue
        # The value may end beyond what was read: read as much again, so that long ones take linear time.
        rest = text[place:]
        if cut and len(rest) > file.ROW_LIMIT:
            what = f"an object of more than {file.ROW_LIMIT:,} characters"
            raise FileProblem("too long", line, what, "write it as rows, one a line (.jsonl)")
        more = stream.read(max(CHUNK, len(rest))) if cut else ""
        file.mark()
        if not more and not rest and not closed:
            return
        if not more:
            line += text.count("\n", place, broken)
            where = f"the JSON array breaks off in element {file.element + 1}" if closed else "broken JSON"
            remedy = "fix it, or write one row a line (.jsonl), where a broken line costs only itself"
            raise FileProblem("broken JSON", line, f"{where} ({problem})", remedy)
        text, place = rest + more, 0
    if closed == "]" and (text[place + 1 :] + stream.read(CHUNK)).strip():
        raise FileProblem("broken JSON", line, "text follows the end of the JSON array", "remove it")
