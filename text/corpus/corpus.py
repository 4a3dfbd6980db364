"""The documents of a corpus, in bounded memory, and each of them once: files, folders and data sets on the Hub."""

from __future__ import annotations

import codecs
import errno
import sqlite3
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import xxhash

from errors import UserError
from text.sources.data_file import DataFile
from text.sources.registry import Source, find_sources
from text.sources.row_report import RowReport
from text.sources.rows import READERS, row_files, rows_of, sample_by_count


class Document(NamedTuple):
    """A text, and the file and line or the row of a Hub data set at which it begins."""

    place: str
    text: str


class Corpus:
    """All documents of `data`, in an order that depends on names alone.

    `data`: sources, or what `find_sources` makes into some. `column` names the text where the source does not, "text"
    if None. `size` is the files' bytes; `report` counts what could not be read, and the bytes read so far.

    Raises `UserError` for what is not there or not readable; while reading, when nothing could be read or, with
    `on_error="stop"`, at the first row that cannot be.
    """

    def __init__(
        self,
        data: str | Sequence[Source],
        column: str | None = None,
        on_error: str = "skip",
        encoding: str = "utf-8",
        report: RowReport | None = None,
    ) -> None:
        try:
            encoding = codecs.lookup(encoding).name
        except LookupError as error:
            raise UserError(f"encoding: {encoding!r} is not known; use utf-8, gb18030 or another codec") from error
        self.report = RowReport() if report is None else report
        self._column, self._settings = column or "text", (on_error, encoding)
        data = find_sources(data, kind="text") if isinstance(data, str) else data
        self.sources = [(path, source) for source in data for path in row_files(source, READERS, self.report)]
        self.data = ", ".join(map(str, data))
        self.size = sum(path.stat().st_size for path, _ in self.sources if isinstance(path, Path))

    def identity(self) -> list[list]:
        """Return what distinguishes this corpus from a changed one: path, size and modification time of each file."""
        found: list[list] = []
        for path, source in self.sources:
            if isinstance(path, Path):
                status = path.stat()
                found.append([str(path.absolute()), status.st_size, status.st_mtime_ns])
            else:
                found.append([path if source.subset is None else f"{path}:{source.subset}", None, None])
            columns = dict(source.layout.columns)
            if (columns, source.samples, source.split, source.folder) != ({}, None, "train", ""):
                found[-1] += [columns, source.samples, source.seed, source.split, source.folder]
        return found

    def __iter__(self) -> Iterator[Document]:
        is_empty = True
        for source, files in groupby(self.sources, key=lambda found: found[1]):
            documents = self._documents([path for path, _ in files], source)
            if source.samples is not None:
                before = self.report.rows - self.report.problems.total()
                documents = sample_by_count(documents, source.samples, source.seed)
                read = self.report.rows - self.report.problems.total() - before
                self.report.left_out += read - len(documents)
            for document in documents:
                is_empty = False
                yield document
        if is_empty:
            raise UserError(self.report.first_error or f"{self.data}: no row has any text; give a file with text")

    def _documents(self, paths: list[Path | str], source: Source) -> Iterator[Document]:
        column = source.layout.columns.get("text", self._column)
        files = (DataFile(path, self.report, column, *self._settings) for path in paths)
        for place, text in rows_of(files, source):
            self.report.rows += 1
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
