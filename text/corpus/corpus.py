"""The documents of a corpus, in bounded memory: from files, folders of files and data sets on the Hub."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from text.sources.data_file import ROW_LIMIT, DataFile
from text.sources.registry import Source, find_sources
from text.sources.row_report import RowReport
from text.sources.rows import READERS, row_files, sample_by_count, text_rows


class Document(NamedTuple):
    """A text, and the file and line or the row of a Hub data set at which it begins."""

    place: str
    text: str


class Corpus:
    """All documents of `data`, in an order that depends on names alone.

    `data`: sources, or what `find_sources` makes into some. `column` names the text where the source does not, "text"
    if None. `size` is the files' bytes; `report` counts what could not be read, and the bytes read so far.

    Raises `UserError` for a path that is not there or of an unknown format and for a folder without data; while
    reading, when nothing could be read or, with `on_error="stop"`, at the first row that cannot be.
    """

    def __init__(
        self,
        data: str | Sequence[Source],
        column: str | None = None,
        on_error: str = "skip",
        encoding: str = "utf-8",
        row_limit: int = ROW_LIMIT,
        report: RowReport | None = None,
    ) -> None:
        if on_error not in ("skip", "stop"):
            raise UserError(f"--on_error {on_error}: must be 'skip' or 'stop'")
        try:
            encoding = codecs.lookup(encoding).name
        except LookupError as error:
            raise UserError(f"encoding: {encoding!r} is not known; use utf-8, gb18030 or another codec") from error
        self.report = RowReport() if report is None else report
        self._column, self._settings = column or "text", (on_error, encoding, row_limit)
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
        for path in paths:
            before = self.report.bytes_read
            for place, text in text_rows(DataFile(path, self.report, column, *self._settings), source):
                self.report.rows += 1
                yield Document(place, text)
            self.report.bytes_read = before + (path.stat().st_size if isinstance(path, Path) else 0)
