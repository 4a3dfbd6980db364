"""Streams the documents of a corpus: files, folders of files and data sets on the Hub, in bounded memory.

Local files are read with the csv, json and pyarrow modules and not with `datasets`: its CSV reader is pandas, where
one broken quote or one byte that is not UTF-8 ends the whole file, its JSON reader gives up likewise, and none of its
readers tells a row's line. Parquet and Arrow it reads through the same pyarrow calls as here. What only `datasets` can
do, streaming from the Hub, is left to it.
"""

from __future__ import annotations

import codecs
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from text.cleaning import Report
from text.csv_documents import read_csv
from text.data_file import ROW_LIMIT, DataFile, FileProblem, Row, disk_file
from text.json_documents import read_json, read_json_lines
from text.table_documents import read_arrow, read_parquet

# Plain text has no rows: a document ends at a blank line, or with the line that makes it this many characters long.
TEXT_DOCUMENT = 8192
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")
# What `save_to_disk` writes beside the data.
METADATA = ("dataset_info.json", "state.json", "dataset_dict.json")


class Document(NamedTuple):
    """A text, the file or Hub data set it comes from, and the line or row at which it begins."""

    text: str
    file: str
    line: int


class Corpus:
    """All documents of `data`, in an order that depends on names alone.

    `data` is one or several, parted by commas, of: a file (.csv .jsonl .json .parquet .arrow .txt, the text formats
    also with .gz), a folder (read recursively, sorted), or a Hub name `owner/name` or `owner/name:config` (its train
    split). `column` names the text, "text" if None. `size` is the files' bytes, `position` those read so far;
    `report` counts what could not be read.

    Raises `UserError` for a path that is not there or of an unknown format and for a folder without data; while
    reading, when nothing could be read or, with `on_error="stop"`, at the first row that cannot be.
    """

    def __init__(
        self,
        data: str,
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
        self.data = data
        self._settings = (column or "text", encoding, self.report, row_limit)
        self.sources: list[Path | str] = []
        parts = [data] if os.path.exists(data) else [part.strip() for part in data.split(",") if part.strip()]
        for part in parts:
            self.sources += self._find(part)
        if not self.sources:
            raise UserError(f"data: {data!r} names nothing; give a file, a folder or a Hub name")
        self.size = sum(source.stat().st_size for source in self.sources if isinstance(source, Path))
        self.position = 0

    def identity(self) -> list[list]:
        """What tells this corpus from a changed one: path, size and modification time of each file."""
        found: list[list] = []
        for source in self.sources:
            if isinstance(source, Path):
                status = source.stat()
                found.append([str(source.absolute()), status.st_size, status.st_mtime_ns])
            else:
                found.append([source, None, None])
        return found

    def __iter__(self) -> Iterator[Document]:
        rows, finished = 0, 0
        for source in self.sources:
            file = DataFile(source, *self._settings)
            rows_before, counts_before = rows, dict(self.report.counts)
            for text, line in self._rows(file):
                rows += 1
                self.position = finished + file.position
                yield Document(text, str(source), line)
            if rows == rows_before and self.report.counts == counts_before:
                self.report.bad("empty file", source, None, "the file has no rows", "give a file with text")
            finished += source.stat().st_size if isinstance(source, Path) else 0
            self.position = finished
        if not rows:
            raise UserError(self.report.first_problem or f"{self.data}: no row has any text; give a file with text")

    def _rows(self, file: DataFile) -> Iterator[Row]:
        """The rows of one file; what ends its reading early is counted as one problem."""
        try:
            yield from (read_hub if isinstance(file.path, str) else _reader(file.path))(file)
        except FileProblem as problem:
            self.report.bad(problem.kind, file.path, problem.line, problem.problem, problem.remedy)
        except UnicodeError as error:
            self.report.bad("undecodable", file.path, None, str(error), "name the encoding it has")
        except (OSError, EOFError, zlib.error) as error:
            self.report.bad("unreadable file", file.path, None, f"cannot be read ({error})", "fetch or mend it")

    def _find(self, part: str) -> list[Path | str]:
        path = Path(part)
        formats = ", ".join(READERS)
        try:
            if path.is_dir():
                return self._find_in_folder(path)
            if path.is_file():
                if _reader(path) is None:
                    raise UserError(f"{path}: a format that is not read; give one of {formats}")
                with open(path, "rb"):
                    return [path]
        except OSError as error:
            raise UserError(
                f"{error.filename or path}: {error.strerror}; check the path and its permissions"
            ) from error
        if HUB_NAME.fullmatch(part) and _reader(path) is None:
            return [part]
        raise UserError(f"{path}: no such file or folder; check the path")

    def _find_in_folder(self, folder: Path) -> list[Path | str]:
        def fail(error: OSError) -> None:
            raise error

        found: list[Path | str] = []
        visited: set[str] = set()
        for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if (real := os.path.realpath(parent)) in visited:  # a link to a folder above would be followed for ever
                folders.clear()
                continue
            visited.add(real)
            for name in names:
                path = Path(parent, name)
                if _reader(path) is not None:
                    found.append(path)
                elif not name.startswith("."):
                    self.report.drop("file of another format", path)
        if not found:
            raise UserError(f"{folder}: the folder has no data; put files of {', '.join(READERS)} there")
        return sorted(found)


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


def read_hub(file: DataFile) -> Iterator[Row]:
    """The train split of a data set on the Hub, streamed. Raises `FileProblem` when the Hub does not give it."""
    import datasets

    name = HUB_NAME.fullmatch(str(file.path))
    try:
        rows = datasets.load_dataset(name["name"], name["config"], split="train", streaming=True)
        for line, row in enumerate(rows, 1):
            yield from file.text_of(row, line)
    except (OSError, ValueError, RuntimeError) as error:
        problem = f"no such path here, and the Hub does not give it ({_first_line(error)})"
        raise FileProblem("unreadable file", None, problem, "check the path or the name and the network") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _reader(path: Path) -> Callable[[DataFile], Iterator[Row]] | None:
    suffix = path.suffix.lower()
    if suffix == ".gz" and (inner := Path(path.stem).suffix.lower()) in ZIPPED:
        return READERS[inner]
    return None if path.name in METADATA else READERS.get(suffix)


READERS = {
    ".csv": read_csv,
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
}
ZIPPED = (".csv", ".jsonl", ".json", ".txt")
