"""Counted cleaning: what happened to each row of a corpus, and which documents are worth keeping.

Nothing is dropped silently. Every row that does not become a document is counted under a kind, with the first few
places where it was met, in a `Report`.
"""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import xxhash

from errors import UserError

EXAMPLES = 3


class Report:
    """Why rows were not kept: `counts[kind]` and the first few `file:line` of each kind. Also `kept` and `characters`.

    `files[kind]` are those among them that are whole files, `left_out` the rows beyond the samples that were asked for,
    `notices` what of the data was not read at all.

    `on_error="skip"` counts rows that cannot be read; `on_error="stop"` raises `UserError` at the first of them.
    Rows that read well but are not wanted (`drop`) are counted either way.
    """

    def __init__(self, on_error: str = "skip") -> None:
        if on_error not in ("skip", "stop"):
            raise UserError(f"on_error: {on_error!r} is neither 'skip' nor 'stop'")
        self.on_error = on_error
        self.kept = self.characters = 0
        self.counts: dict[str, int] = {}
        self.files: dict[str, int] = {}
        self.left_out = 0
        self.examples: dict[str, list[str]] = {}
        self.first_problem: str | None = None
        self.notices: list[str] = []

    def bad(
        self, kind: str, file: str | Path, line: int | None, problem: str, remedy: str, ends_file: bool = False
    ) -> None:
        """A row, or with `line=None` a file, that cannot be read. Raises `UserError` with `on_error="stop"`.

        ends_file: at the line nothing can be read any more; that is counted as a file, not as a row.
        """
        place = f"{file}:{line}" if line else str(file)
        message = f"{place}: {problem}; {remedy}"
        if self.on_error == "stop":
            raise UserError(f"{message}, or skip and count such rows with on_error skip")
        self.first_problem = self.first_problem or message
        self._count(kind, place, ends_file or line is None)

    def drop(self, kind: str, file: str | Path, line: int | None = None) -> None:
        """A row that reads well and is not wanted."""
        self._count(kind, f"{file}:{line}" if line else str(file), line is None)

    def summary(self) -> list[str]:
        """The notices, then one line a kind, the most frequent first: kind, count and first places."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        counts = [
            f"{kind}: {self._shown(kind, count)} (first: {', '.join(self.examples[kind])})" for kind, count in ordered
        ]
        return [*self.notices, *counts]

    def _shown(self, kind: str, count: int) -> str:
        files = self.files.get(kind, 0)
        return f"{count:,}" if files in (0, count) else f"{count - files:,} and {files:,} whole files"

    @property
    def unused(self) -> dict[str, int]:
        """What became of the rows that were not kept, for `text.sources.row_report.balance`."""
        rows = {kind: count - self.files.get(kind, 0) for kind, count in self.counts.items()}
        return {"more than were asked for": self.left_out, **rows}

    def _count(self, kind: str, place: str, is_file: bool) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if is_file:
            self.files[kind] = self.files.get(kind, 0) + 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append(place)


class SeenHashes:
    """A set of 64-bit hashes in at most 64 MB of memory, whatever their number: a table in a temporary file.

    A Python set needs about 100 bytes a hash, which is 1 GB at ten million documents. SQLite keeps what does not fit
    its cache on disk, at 16 to 20 bytes a hash, and an insertion takes 2 to 5 microseconds.
    """

    CACHE_KIB = 64 * 1024

    def __init__(self, folder: Path) -> None:
        self._file = folder / "seen.sqlite.tmp"
        self._file.unlink(missing_ok=True)
        self._connection = sqlite3.connect(self._file, isolation_level=None)
        # The table is made anew on each run, so it needs neither a journal nor the disk's word that it is written.
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{self.CACHE_KIB}"):
            self._connection.execute(f"PRAGMA {setting}")
        self._connection.execute("CREATE TABLE seen (hash INTEGER PRIMARY KEY)")
        self._connection.execute("BEGIN")
        self._cursor = self._connection.cursor()

    def add(self, digest: int) -> bool:
        """Remember a hash (0 <= digest < 2**64); False when it was there already. Raises `OSError` on a full disk."""
        try:
            # SQLite's integers are signed.
            self._cursor.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest - (1 << 63),))
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device", str(self._file)) from error
            raise
        return self._cursor.rowcount == 1

    def close(self) -> None:
        """Close the table and delete its file."""
        self._connection.close()
        self._file.unlink(missing_ok=True)


class Cleaner:
    """Keeps each text once, if it says something. Exact duplicates are found by 64-bit hashes (xxh3).

    Among ten million documents the chance that even one is taken for a duplicate wrongly is 3 in a million.
    """

    def __init__(self, report: Report, seen: SeenHashes, min_chars: int = 1) -> None:
        self.report = report
        self._seen = seen
        self._min_chars = min_chars

    def accept(self, text: str, file: str | Path, line: int) -> tuple[int, bytes] | None:
        """The text's 64-bit hash and its UTF-8 bytes; None, counted in the report, when it is not to be kept."""
        if not text or text.isspace():
            self.report.drop("empty", file, line)
        elif len(text) < self._min_chars:
            self.report.drop(f"shorter than {self._min_chars} characters", file, line)
        else:
            data = text.encode("utf-8")
            digest = xxhash.xxh3_64_intdigest(data)
            if self._seen.add(digest):
                self.report.kept += 1
                self.report.characters += len(text)
                return digest, data
            self.report.drop("exact duplicate", file, line)
        return None
