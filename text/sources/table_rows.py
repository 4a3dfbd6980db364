"""Rows of Parquet and Arrow files, in bounded memory, with row numbers, and of data sets on the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from text.sources.data_file import DataFile, FileProblem

if TYPE_CHECKING:
    import pyarrow

    from text.sources.registry import Source

ROWS_AT_ONCE = 128


def table_rows(file: DataFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each row and the row; of whole rows, columns in which it has nothing are left out."""
    import pyarrow

    batches = _parquet_batches if Path(file.path).suffix.lower() == ".parquet" else _arrow_batches
    line = 1
    try:
        for batch in batches(file):
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield from _rows(file, batch.slice(start, ROWS_AT_ONCE), line + start)
            line += batch.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the second: the name of a column
        problem = f"damaged ({str(error).splitlines()[0]})"
        raise FileProblem("unreadable file", None, problem, "fetch or write it again") from error


def without_nulls(value: Any) -> Any:
    """Return a value without what it does not have: in a table each row, and each object in a list, has every field.

    NaN is what pandas writes for nothing.
    """
    if isinstance(value, dict):
        return {name: without_nulls(field) for name, field in value.items() if field is not None and field == field}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def hub_rows(file: DataFile, source: Source) -> Iterator[tuple[int, Any]]:
    """Stream the rows of a data set on the Hub. Raises `FileProblem` when the Hub does not give it."""
    import datasets

    more = {"data_dir": source.folder} if source.folder else {}
    try:
        rows = datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True, **more)
        for number, row in enumerate(rows, 1):
            yield number, without_nulls(row) if file.column is None else row
    except (OSError, ValueError, RuntimeError) as error:
        line = re.split(r"[\r\n]", str(error), maxsplit=1)[0] or type(error).__name__
        problem = f"no such path here, and the Hub does not give it ({line})"
        raise FileProblem("unreadable file", None, problem, "check the path or the name and the network") from error


def _rows(file: DataFile, batch: pyarrow.RecordBatch, line: int) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # one value that is not UTF-8 costs only its row
        rows = [_row_or_none(batch, place) for place in range(batch.num_rows)]
    for number, row in enumerate(rows, line):
        if row is None:
            file.bad("undecodable", number, "not UTF-8", file.conversion("GBK", "gb18030"))
        else:
            yield number, without_nulls(row) if file.column is None else row


def _row_or_none(batch: pyarrow.RecordBatch, place: int) -> dict[str, Any] | None:
    try:
        return batch.slice(place, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _parquet_batches(file: DataFile) -> Iterator[pyarrow.RecordBatch]:
    """Yield the column, or all, a few rows at a time: a row group may exceed memory."""
    import pyarrow.parquet

    # Without a buffer size pyarrow reads a row group's whole column at once.
    with pyarrow.parquet.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False) as table:
        columns = _columns(file, table.schema_arrow.names)
        size, rows, read = Path(file.path).stat().st_size, max(table.metadata.num_rows, 1), 0
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
            yield batch
            read += batch.num_rows
            file.position = size * read // rows


def _arrow_batches(file: DataFile) -> Iterator[pyarrow.RecordBatch]:
    """Yield the record batches of an Arrow file or stream (`datasets` writes streams)."""
    import pyarrow.ipc

    # Not memory-mapped: the pages of a map count as this process's memory.
    with pyarrow.OSFile(str(file.path)) as source:
        is_stream = source.read(6) != b"ARROW1"
        source.seek(0)
        opened = (pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file)(source)
        for batch in opened if is_stream else map(opened.get_batch, range(opened.num_record_batches)):
            for column in batch.columns:  # pyarrow itself trusts a file; text is taken as bytes here, UTF-8 or not
                column.view(_as_bytes(column.type)).validate(full=True)
            columns = _columns(file, batch.schema.names)
            yield batch if columns is None else batch.select(columns)
            file.position = source.tell()


def _columns(file: DataFile, names: list[str]) -> list[str] | None:
    if file.column is not None and file.column not in names:
        raise file.no_column(names, None)
    return None if file.column is None else [file.column]


def _as_bytes(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Return a type in which text, however deep, is bytes that are laid out alike."""
    import pyarrow as pa

    flat = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _as_bytes(kind.value_type), kind.ordered)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_as_bytes(kind.value_type), kind.list_size)
    lists = (("is_list", pa.list_), ("is_large_list", pa.large_list), ("is_list_view", pa.list_view),
             ("is_large_list_view", pa.large_list_view))  # fmt: skip
    for is_kind, make in lists:
        if getattr(pa.types, is_kind)(kind):
            return make(_as_bytes(kind.value_type))
    return flat.get(kind, kind)
