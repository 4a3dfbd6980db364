"""Cleaning of a corpus: each document once, if it holds anything. What is not kept is counted in the report."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import xxhash

from text.sources.row_report import RowReport


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
        # Each run writes the table again, so it needs neither a journal nor the disk's word that it is written.
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
    """Keeps each text once, if it holds anything. Exact duplicates are found by 64-bit hashes (xxh3).

    Among ten million documents the chance that even one is taken for a duplicate wrongly is 3 in a million.
    `characters`: of the kept texts.
    """

    def __init__(self, report: RowReport, seen: SeenHashes, min_chars: int = 1) -> None:
        self.report, self.characters = report, 0
        self._seen, self._min_chars = seen, min_chars

    def accept(self, place: str, text: str) -> tuple[int, bytes] | None:
        """Return the text's hash and its UTF-8 bytes; None, counted in the report, when it is not to be kept."""
        if not text or text.isspace():
            self.report.drop("empty", place)
        elif len(text) < self._min_chars:
            self.report.drop(f"shorter than {self._min_chars} characters", place)
        else:
            data = text.encode("utf-8")
            digest = xxhash.xxh3_64_intdigest(data)
            if self._seen.add(digest):
                self.report.kept += 1
                self.characters += len(text)
                return digest, data
            self.report.drop("exact duplicate", place)
        return None
