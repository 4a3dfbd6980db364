"""The documents of a corpus, in bounded memory, and each of them once."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from errors import UserError
from text.sources.data_file import DataFile
from text.sources.registry import Source
from text.sources.row_report import RowReport
from text.sources.rows import rows_of, sample_by_count

if TYPE_CHECKING:
    from text.corpus.corpus import Corpus


class Document(NamedTuple):
    """A text, and the file and line or the row of a Hub data set at which it begins."""

    place: str
    text: str


def read(corpus: Corpus) -> Iterator[Document]:
    """Yield the documents of a corpus in the order of its files; see `Corpus`."""
    is_empty = True
    for source, files in groupby(corpus.sources, key=lambda found: found[1]):
        documents = _documents(corpus, [path for path, _ in files], source)
        if source.samples is not None:
            before = corpus.report.rows - corpus.report.problems.total()
            documents = sample_by_count(documents, source.samples, source.seed)
            used = corpus.report.rows - corpus.report.problems.total() - before
            corpus.report.left_out += used - len(documents)
        for document in documents:
            is_empty = False
            yield document
    if is_empty:
        raise UserError(corpus.report.first_error or f"{corpus.data}: no row has any text; give a file with text")


def _documents(corpus: Corpus, paths: list[Path | str], source: Source) -> Iterator[Document]:
    column = source.layout.columns.get("text", corpus.column)
    files = (DataFile(path, corpus.report, column, *corpus.settings) for path in paths)
    for place, text in rows_of(files, source):
        corpus.report.rows += 1
        yield Document(place, text)


class Cleaner:
    """Accept each text once, if it holds anything; what is not accepted is counted in the report.

    Exact duplicates are found by 64-bit hashes (xxh3): among ten million documents the chance that even one is taken
    for a duplicate wrongly is 3 in a million. A Python set of as many needs 1 GB; SQLite keeps what does not fit its
    cache in a temporary file in `folder`, at 20 bytes a hash, and an insertion takes 2 to 5 microseconds.
    `characters`: of the accepted texts.
    """

    CACHE_KIB = 64 * 1024

    def __init__(self, report: RowReport, folder: Path, min_chars: int = 1) -> None:
        self.report, self.characters, self._min_chars = report, 0, min_chars
        self._file = folder / "seen.sqlite.tmp"
        self._file.unlink(missing_ok=True)
        self._connection = sqlite3.connect(self._file, isolation_level=None)
        # Each run writes the table again, so it needs neither a journal nor the disk's word that it is written.
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{self.CACHE_KIB}"):
            self._connection.execute(f"PRAGMA {setting}")
        self._connection.execute("CREATE TABLE seen (hash INTEGER PRIMARY KEY)")
        self._connection.execute("BEGIN")
        self._cursor = self._connection.cursor()

    def accept(self, place: str, text: str) -> tuple[int, bytes] | None:
        """Return the text's hash and its UTF-8 bytes, None when it is not accepted. Raises `OSError` on a full disk."""
        if not text or text.isspace():
            self.report.drop("empty", place)
        elif len(text) < self._min_chars:
            self.report.drop(f"shorter than {self._min_chars} characters", place)
        else:
            data = text.encode("utf-8")
            digest = xxhash.xxh3_64_intdigest(data)
            if self._is_new(digest):
                self.report.accepted += 1
                self.characters += len(text)
                return digest, data
            self.report.drop("exact duplicate", place)
        return None

    def _is_new(self, digest: int) -> bool:
        try:
            # SQLite's integers are signed.
            self._cursor.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest - (1 << 63),))
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device", str(self._file)) from error
            raise
        return self._cursor.rowcount == 1

    def close(self) -> None:
        """Delete the table of hashes."""
        self._connection.close()
        self._file.unlink(missing_ok=True)
