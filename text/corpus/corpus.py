"""The documents of a corpus, in bounded memory: from files, folders of files and data sets on the Hub."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from text.sources.data_file import ROW_LIMIT, DataFile, suffix_of
from text.sources.registry import HUB_NAME, Source
from text.sources.row_report import RowReport
from text.sources.rows import READERS, row_files, sample_by_count, text_rows


class Document(NamedTuple):
    """A text, and the file and line or the row of a Hub data set at which it begins."""

    place: str
    text: str


class Corpus:
    """All documents of `data`, in an order that depends on names alone.

    `data` is one or several, separated by commas, of: a file (.csv .jsonl .ndjson .json .parquet .arrow .txt, the text
    formats also with .gz), a folder (read recursively, sorted), or a Hub name `owner/name` or `owner/name:config` (its
    train split); or sources as `registry` finds them. `column` names the text where the source does not, "text" if
    None. `size` is the files' bytes; `report` counts what could not be read, and the bytes read so far.

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
        if isinstance(data, str):
            parts = [data] if os.path.exists(data) else [part.strip() for part in data.split(",") if part.strip()]
            data = [_source(part) for part in parts]
        self.sources = [(path, source) for source in data for path in row_files(source, READERS, self.report)]
        self.data = ", ".join(map(str, data))
        if not self.sources:
            raise UserError(f"data: {self.data!r} names nothing; give a file, a folder or a Hub name")
        self.size = sum(path.stat().st_size for path, _ in self.sources if isinstance(path, Path))

    def identity(self) -> list[list]:
        """Return what distinguishes this corpus from a changed one: path, size and modification time of each file."""
        found: list[list] = []
        for path, source in self.sources:
            special = _special(source)
            if isinstance(path, Path):
                status = path.stat()
                found.append([str(path.absolute()), status.st_size, status.st_mtime_ns, *special])
            else:
                name = path if source.subset is None else f"{path}:{source.subset}"
                found.append([name, None, None, *special])
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


def _source(part: str) -> Source:
    """Return a path or, where it is not one, `owner/name` or `owner/name:config` on the Hub."""
    hub = HUB_NAME.fullmatch(part)
    if not hub or os.path.exists(part) or suffix_of(Path(part)) in READERS:
        return Source(part)
    return Source(hub["name"], is_hub=True, subset=hub["config"])


def _special(source: Source) -> list:
    """Return what is chosen of a source beside its path; nothing where it is read whole, in the recipe's column."""
    if (source.layout.columns, source.samples, source.split, source.folder) == ({}, None, "train", ""):
        return []
    return [dict(source.layout.columns), source.samples, source.seed, source.split, source.folder]
