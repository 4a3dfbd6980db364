"""Documents of plain text files, with the number of their first line."""

from __future__ import annotations

from collections.abc import Iterator

from text.sources.data_file import DataFile

# Plain text has no rows: a document ends at a blank line, or with the line that makes it this many characters long.
TEXT_DOCUMENT = 8192


def text_rows(file: DataFile) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield plain text: a blank line ends a document, and so does the line that brings it to `TEXT_DOCUMENT`."""
    with file.open() as stream:
        document: list[str] = []
        size, first, line = 0, 1, 1
        while True:
            piece = stream.readline(TEXT_DOCUMENT)  # a line longer than a document comes in pieces
            blank = not piece or piece.isspace()
            if not blank and file.usable(line, piece):
                first = first if document else line
                document.append(piece)
                size += len(piece)
            if document and (blank or size >= TEXT_DOCUMENT):
                file.mark()
                yield first, {file.column: "".join(document).rstrip("\r\n")}
                document, size = [], 0
            if not piece:
                return
            line += piece[-1] == "\n"
