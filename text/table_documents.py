"""Documents of Parquet and Arrow files, in bounded memory, with row numbers. pyarrow is imported when one is met."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from text.data_file import DataFile, FileProblem, Row

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 128


def read_parquet(file: DataFile) -> Iterator[Row]:
    """The wanted column of a Parquet file, page by page: a row group may be larger than the memory."""
    import pyarrow
    import pyarrow.parquet

    try:
        # Without a buffer size pyarrow reads a row group's whole column at once.
        with pyarrow.parquet.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False) as table:
            if file.column not in table.schema_arrow.names:
                raise file.no_column(table.schema_arrow.names, None)
            size, rows, line = file.path.stat().st_size, max(table.metadata.num_rows, 1), 1
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[file.column], use_threads=False):
                yield from _rows(file, batch.column(0), line)
                line += batch.num_rows
                file.position = size * (line - 1) // rows
    except pyarrow.ArrowException as error:
        raise _damaged(error) from error


def read_arrow(file: DataFile) -> Iterator[Row]:
    """The wanted column of an Arrow file or stream (`datasets` writes streams), one record batch at a time."""
    import pyarrow

    try:
        # Not memory-mapped: the pages of a map count as this process's memory.
        with pyarrow.OSFile(str(file.path)) as source:
            line = 1
            for batch in _record_batches(source):
                if file.column not in batch.schema.names:
                    raise file.no_column(batch.schema.names, None)
                column = batch.column(batch.schema.get_field_index(file.column))
                for start in range(0, len(column), ROWS_AT_ONCE):
                    yield from _rows(file, column.slice(start, ROWS_AT_ONCE), line + start)
                line += len(column)
                file.position = source.tell()
    except pyarrow.ArrowException as error:
        raise _damaged(error) from error


def _record_batches(source: pyarrow.NativeFile) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.ipc

    magic = source.read(6)
    source.seek(0)
    if magic == b"ARROW1":
        table = pyarrow.ipc.open_file(source)
        for number in range(table.num_record_batches):
            yield table.get_batch(number)
    else:
        yield from pyarrow.ipc.open_stream(source)


def _rows(file: DataFile, column: pyarrow.Array, line: int) -> Iterator[Row]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        raise file.not_text(str(column.type), None)
    # As bytes, since one value that is not UTF-8 would keep pyarrow from giving any.
    for number, value in enumerate(column.cast(pyarrow.large_binary()).to_pylist(), line):
        text = "" if value is None else value.decode("utf-8", "surrogateescape")
        if file.usable(text, number):
            yield text, number


def _damaged(error: Exception) -> FileProblem:
    return FileProblem("unreadable file", None, f"damaged ({str(error).splitlines()[0]})", "fetch or write it again")
