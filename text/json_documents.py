"""Documents of JSON lines and JSON lists of any size, with line numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Any

from text.data_file import DataFile, FileProblem, Row, disk_file

CHUNK = 1 << 20


def read_json_lines(file: DataFile) -> Iterator[Row]:
    """The wanted field of one JSON object a line. Blank lines are no rows."""
    with file.open() as stream:
        for line, content in file.lines(stream):
            if content.isspace():
                continue
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as error:
                if file.usable(content, line):
                    file.bad("broken JSON", line, f"broken JSON ({error})", "mend or delete the line")
                continue
            yield from file.text_of(row, line)


def read_json(file: DataFile) -> Iterator[Row]:
    """The wanted field of each object in a JSON list; a file that does not begin with [ is read as JSON lines.

    Raises `FileProblem` where the list breaks: nothing tells where its next item would begin.
    """
    with file.open() as stream:
        beginning = stream.read(1024).lstrip()
    if not beginning.startswith("["):
        yield from read_json_lines(file)
        return
    with file.open() as stream:
        for line, item in _list_items(file, stream):
            yield from file.text_of(item, line)


def _list_items(file: DataFile, stream: TextIOWrapper) -> Iterator[tuple[int, Any]]:
    """The items of a JSON list, one at a time, with the lines they begin at."""
    decoder, blank, raw = json.JSONDecoder(), re.compile(r"[\s,]*"), disk_file(stream)
    text = stream.read(CHUNK)
    place = text.index("[") + 1
    line = 1 + text.count("\n", 0, place)
    while True:
        start = blank.match(text, place).end()
        line += text.count("\n", place, start)
        place = start
        problem = "the list is not closed"
        if place < len(text):
            if text[place] == "]":
                return
            try:
                item, end = decoder.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                problem = f"broken JSON ({str(error).split(': line')[0]})"
            else:
                yield line, item
                line += text.count("\n", place, end)
                place = end
                continue
        # The item may end beyond what was read: read as much again, so that long items take linear time.
        rest = text[place:]
        more = stream.read(max(CHUNK, len(rest))) if len(rest) <= file.row_limit else ""
        file.position = raw.tell()
        if not more:
            raise FileProblem("broken JSON", line, f"{problem}; the rest is not read", "mend it or use JSON lines")
        text, place = rest + more, 0
