"""What was measured so far, on disk: a measurement that was stopped goes on with the chunk that it was at."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from errors import naming
from eval.suites.suite import Row
from text.files import json_text


class MeasuredRows:
    """JSONL: a line that says what is measured on what, then a line for each item, in order, flushed chunk by chunk.

    Each of these has a checksum of its content and its place, `crc32`: what was damaged, edited or moved is measured
    again.

    Attributes: rows: of whole chunks. started_anew: why what the file held was not taken, or nothing.
    """

    def __init__(self, path: Path, facts: dict[str, Any], chunk: int) -> None:
        """facts: all that the rows depend on. Rows of other facts, torn and damaged chunks are forgotten."""
        self.path, self.rows, self.started_anew = path, [], ""
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        found = [_parsed(line) for line in lines[:1]] + [_checked(line, place) for place, line in enumerate(lines[1:])]
        if found and found[0] == facts:
            whole = next((number for number, row in enumerate(found) if row is None), len(found)) - 1
            self.rows = found[1 : whole - whole % chunk + 1] if whole < facts["items"] else found[1 : whole + 1]
        elif found:
            self.started_anew = f"{path}: held other measurements; started anew"
        kept = json_text(facts).encode() + b"\n" + b"".join(map(_line, self.rows, count()))
        with naming(path):
            self._file = path.open("wb")
            self._file.write(kept)
            self._file.flush()

    def __enter__(self) -> MeasuredRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, rows: Sequence[Row]) -> None:
        """Write a chunk down."""
        with naming(self.path):
            self._file.write(b"".join(map(_line, rows, count(len(self.rows)))))
            self._file.flush()
        self.rows += rows


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _checked(line: bytes, place: int) -> Row | None:
    row = _parsed(line)
    return row if row is not None and row.pop("crc32", None) == _checksum(row, place) else None


def _checksum(row: Row, place: int) -> int:
    return zlib.crc32(json.dumps([place, row]).encode())


def _line(row: dict[str, Any], place: int) -> bytes:
    return json_text({**row, "crc32": _checksum(row, place)}).encode() + b"\n"
