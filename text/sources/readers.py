"""Streams the documents of a corpus: files, folders of files and data sets on the Hub, in bounded memory.

Local files are read with the csv, json and pyarrow modules and not with `datasets`: its CSV reader is pandas, where
one broken quote or one byte that is not UTF-8 ends the whole file, its JSON reader gives up likewise, and none of its
readers tells a row's line. Parquet and Arrow it reads through the same pyarrow calls as here. What only `datasets` can
do, streaming from the Hub, is left to it.
"""

from __future__ import annotations

import codecs
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from text.corpus.cleaning import Report
from text.sources.csv_rows import read_csv
from text.sources.data_file import METADATA, ROW_LIMIT, DataFile, FileProblem, Row, disk_file, suffix_of
from text.sources.folders import Folder
from text.sources.hub import hub_rows
from text.sources.json_rows import read_json
from text.sources.registry import HUB_NAME, Source
from text.sources.sampling import sample_by_count
from text.sources.table_rows import read_arrow, read_parquet

# Plain text has no rows: a document ends at a blank line, or with the line that makes it this many characters long.
TEXT_DOCUMENT = 8192


class Document(NamedTuple):
    """A text, the file or Hub data set it comes from, and the line or row at which it begins."""

    text: str
    file: str
    line: int


class Corpus:
    """All documents of `data`, in an order that depends on names alone.

    `data` is one or several, parted by commas, of: a file (.csv .jsonl .ndjson .json .parquet .arrow .txt, the text
    formats also with .gz), a folder (read recursively, sorted), or a Hub name `owner/name` or `owner/name:config` (its
    train split); or sources as `registry` finds them. `column` names the text where the source does not, "text" if
    None.
    `size` is the files' bytes, `position` those read so far; `report` counts what could not be read.

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
    ) -> None:
        try:
            encoding = codecs.lookup(encoding).name
        except LookupError as error:
            raise UserError(f"encoding: {encoding!r} is not known; use utf-8, gb18030 or another codec") from error
        self.report = Report(on_error)
        self._column, self._settings = column or "text", (encoding, self.report, row_limit)
        self.sources: list[tuple[Path | str, Source]] = []
        if isinstance(data, str):
            parts = [data] if os.path.exists(data) else [part.strip() for part in data.split(",") if part.strip()]
            data = [_source(part) for part in parts]
        for source in data:
            self.sources += [(place, source) for place in self._find(source)]
        self.data = ", ".join(map(str, data))
        if not self.sources:
            raise UserError(f"data: {self.data!r} names nothing; give a file, a folder or a Hub name")
        self.size = sum(place.stat().st_size for place, _ in self.sources if isinstance(place, Path))
        self.position = 0

    def identity(self) -> list[list]:
        """What tells this corpus from a changed one: path, size and modification time of each file."""
        found: list[list] = []
        for place, source in self.sources:
            special = _special(source)
            if isinstance(place, Path):
                status = place.stat()
                found.append([str(place.absolute()), status.st_size, status.st_mtime_ns, *special])
            else:
                found.append([place, None, None, *special])
        return found

    def __iter__(self) -> Iterator[Document]:
        documents, self._finished = 0, 0
        for source, places in groupby(self.sources, key=lambda found: found[1]):
            of_source = self._documents([place for place, _ in places], source)
            if source.samples is not None:
                of_source = self._sampled(of_source, source)
            for document in of_source:
                documents += 1
                yield document
        if not documents:
            raise UserError(self.report.first_problem or f"{self.data}: no row has any text; give a file with text")

    def _sampled(self, documents: Iterator[Document], source: Source) -> list[Document]:
        """As many of the documents as the source's samples; the others are counted."""
        seen = 0

        def counted() -> Iterator[Document]:
            nonlocal seen
            for seen, document in enumerate(documents, start=1):  # noqa: B007, which does not know nonlocal
                yield document

        chosen = sample_by_count(counted(), source.samples, source.seed)
        self.report.left_out += seen - len(chosen)
        return chosen

    def _documents(self, places: list[Path | str], source: Source) -> Iterator[Document]:
        """The documents of a source."""
        column = source.layout.columns.get("text", self._column)
        for place in places:
            file = DataFile(place, column, *self._settings)
            rows, counts_before = 0, dict(self.report.counts)
            for text, line in self._rows(file, source):
                rows += 1
                self.position = self._finished + file.position
                yield Document(text, str(place), line)
            if not rows and self.report.counts == counts_before:
                self.report.bad("empty file", place, None, "the file has no rows", "give a file with text")
            self._finished += place.stat().st_size if isinstance(place, Path) else 0
            self.position = self._finished

    def _rows(self, file: DataFile, source: Source) -> Iterator[Row]:
        """The rows of one file; what ends its reading early is counted as one problem."""
        try:
            if isinstance(file.path, str):
                for number, row in enumerate(hub_rows(source), 1):
                    yield from file.text_of(row, number)
            else:
                yield from _reader(file.path)(file)
        except FileProblem as problem:
            self.report.bad(problem.kind, file.path, problem.line, problem.problem, problem.remedy, ends_file=True)
        except UnicodeError as error:
            self.report.bad("undecodable", file.path, None, str(error), "name the encoding it has")
        except (OSError, EOFError, zlib.error) as error:
            self.report.bad("unreadable file", file.path, None, f"cannot be read ({error})", "fetch or mend it")

    def _find(self, source: Source) -> list[Path | str]:
        if source.is_hub:
            return [source.path if source.subset is None else f"{source.path}:{source.subset}"]
        path = Path(source.path)
        formats = ", ".join(READERS)
        try:
            if path.is_dir():
                return self._find_in_folder(path, source.split)
            if path.is_file():
                if _reader(path) is None:
                    raise UserError(f"{path}: a format that is not read; give one of {formats}")
                with open(path, "rb"):
                    return [path]
        except OSError as error:
            raise UserError(
                f"{error.filename or path}: {error.strerror}; check the path and its permissions"
            ) from error
        raise UserError(f"{path}: no such file or folder; check the path")

    def _find_in_folder(self, path: Path, split: str) -> list[Path | str]:
        folder = Folder.read(path, READERS, split)
        for stranger in folder.strangers:
            self.report.drop("file of another format", stranger)
        if notice := folder.notice():
            self.report.notices.append(notice)
        if not folder.files:
            raise UserError(f"{path}: the folder has no data; put files of {', '.join(READERS)} there")
        return list(folder.files)


def read_text(file: DataFile) -> Iterator[Row]:
    """Plain text: a blank line ends a document, and so does the line that makes it `TEXT_DOCUMENT` characters long."""
    with file.open() as stream:
        raw = disk_file(stream)
        document: list[str] = []
        size, first, line = 0, 1, 1
        while piece := stream.readline(TEXT_DOCUMENT):  # a line longer than a document comes in pieces
            blank = piece.isspace()
            if not blank and file.usable(piece, line):
                first = first if document else line
                document.append(piece)
                size += len(piece)
            if document and (blank or size >= TEXT_DOCUMENT):
                file.position = raw.tell()
                yield "".join(document).rstrip("\r\n"), first
                document, size = [], 0
            line += piece[-1] == "\n"
        if document:
            yield "".join(document).rstrip("\r\n"), first


def _source(part: str) -> Source:
    """A path or, where it is none, `owner/name` or `owner/name:config` on the Hub."""
    hub = HUB_NAME.fullmatch(part)
    if not hub or os.path.exists(part) or _reader(Path(part)) is not None:
        return Source(part)
    return Source(hub["name"], is_hub=True, subset=hub["config"])


def _special(source: Source) -> list:
    """What is chosen of a source beside its place; nothing where it is read whole, in the column of the recipe."""
    if (source.layout.columns, source.samples, source.split, source.folder) == ({}, None, "train", ""):
        return []
    return [dict(source.layout.columns), source.samples, source.seed, source.split, source.folder]


def _reader(path: Path) -> Callable[[DataFile], Iterator[Row]] | None:
    return None if path.name in METADATA else READERS.get(suffix_of(path))


READERS = {
    ".csv": read_csv,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
}
