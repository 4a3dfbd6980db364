"""The files of a corpus, folders and data sets on the Hub among them, and what distinguishes it from a changed one."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from errors import UserError
from text.sources.folders import READERS, row_files
from text.sources.registry import Source, find_sources
from text.sources.row_report import RowReport

if TYPE_CHECKING:
    from text.corpus.documents import Document


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
        self.column, self.settings = column or "text", (on_error, encoding)
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
        return resolve_name("text.corpus.documents:read")(self)
