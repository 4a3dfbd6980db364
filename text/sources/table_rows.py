"""Rows and documents of Parquet and Arrow files, in bounded memory, with row numbers.

pyarrow is imported when such a file is met.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from text.sources.data_file import DataFile, FileProblem, Row, conversion

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 128


def read_parquet(file: DataFile) -> Iterator[Row]:
    """The wanted column of a Parquet file."""
    for batch, line in _parquet_batches(file):
        yield from _texts(file, batch.column(0), line)


def read_arrow(file: DataFile) -> Iterator[Row]:
    """The wanted column of an Arrow file or stream."""
    for batch, line in _arrow_batches(file):
        yield from _texts(file, batch.column(batch.schema.get_field_index(file.column)), line)


def parquet_rows(file: DataFile) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole rows of a Parquet file, each with its number. A column in which a row has nothing is left out of it."""
    for batch, line in _parquet_batches(file):
        yield from _whole_rows(file, batch, line)


def arrow_rows(file: DataFile) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole rows of an Arrow file or stream, as `parquet_rows`."""
    for batch, line in _arrow_batches(file):
        yield from _whole_rows(file, batch, line)


def without_nulls(value: Any) -> Any:
    """A value of a table without what it does not have: there each row, and each object in a list, has every field.

    NaN is what pandas writes for nothing.
    """
    if isinstance(value, dict):
        return {name: without_nulls(field) for name, field in value.items() if field is not None and field == field}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _parquet_batches(file: DataFile) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """The wanted column, or all, a few rows at a time with the number of the first: a row group may exceed memory."""
    import pyarrow
    import pyarrow.parquet

    try:
        # Without a buffer size pyarrow reads a row group's whole column at once.
        with pyarrow.parquet.ParquetFile(file.path, buffer_size=1 << 20, pre_buffer=False) as table:
            if file.column is not None and file.column not in table.schema_arrow.names:
                raise file.no_column(table.schema_arrow.names, None)
            size, rows, line = Path(file.path).stat().st_size, max(table.metadata.num_rows, 1), 1
            columns = None if file.column is None else [file.column]
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
                yield batch, line
                line += batch.num_rows
                file.position = size * (line - 1) // rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the second: the name of a column
        raise _damaged(error) from error


def _arrow_batches(file: DataFile) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """Slices of the record batches of an Arrow file or stream (`datasets` writes streams), with the first's number."""
    import pyarrow

    try:
        # Not memory-mapped: the pages of a map count as this process's memory.
        with pyarrow.OSFile(str(file.path)) as source:
            line = 1
            for batch in _record_batches(source):
                for column in batch.columns:
                    _check_places(column)
                if file.column is not None and file.column not in batch.schema.names:
                    raise file.no_column(batch.schema.names, None)
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                    yield batch.slice(start, ROWS_AT_ONCE), line + start
                line += batch.num_rows
                file.position = source.tell()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the second: the name of a column
        raise _damaged(error) from error


def _check_places(array: pyarrow.Array) -> None:
    """Raises `ArrowInvalid` where values would lie outside of what was read: pyarrow itself trusts a file.

    Text is taken as bytes, so that one value that is not UTF-8 costs no more than its row.
    """
    import pyarrow
    from pyarrow import types

    if types.is_struct(array.type):
        array.validate()
        for number in range(array.type.num_fields):
            _check_places(array.field(number))
    elif types.is_list(array.type) or types.is_large_list(array.type):
        array.validate()
        offsets = array.offsets.to_numpy()
        if (offsets[1:] < offsets[:-1]).any():
            raise pyarrow.ArrowInvalid("a list that ends before it begins")
        _check_places(array.values)
    elif types.is_list_view(array.type) or types.is_large_list_view(array.type):
        array.validate()
        begin, size = array.offsets.to_numpy(), array.sizes.to_numpy()
        if ((begin < 0) | (size < 0) | (begin > len(array.values) - size)).any():
            raise pyarrow.ArrowInvalid("a list that lies outside of its values")
        _check_places(array.values)
    elif types.is_fixed_size_list(array.type):
        array.validate()
        _check_places(array.values)
    elif types.is_dictionary(array.type):
        array.validate()
        array.indices.validate(full=True)
        places = array.indices.drop_null().to_numpy()
        if ((places < 0) | (places >= len(array.dictionary))).any():
            raise pyarrow.ArrowInvalid("a value that is not in its dictionary")
        _check_places(array.dictionary)
    elif (binary := _binary_of(array.type)) is not None:
        array.view(binary).validate(full=True)
    else:
        array.validate(full=True)


def _binary_of(kind: pyarrow.DataType) -> pyarrow.DataType | None:
    """A type of text as the type of bytes that is laid out alike; None for what is no text."""
    import pyarrow
    from pyarrow import types

    for is_text, binary in (
        (types.is_string, pyarrow.binary()),
        (types.is_large_string, pyarrow.large_binary()),
        (types.is_string_view, pyarrow.binary_view()),
    ):
        if is_text(kind):
            return binary
    return None


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


def _whole_rows(file: DataFile, batch: pyarrow.RecordBatch, line: int) -> Iterator[tuple[dict[str, Any], int]]:
    for place in range(batch.num_rows):
        try:
            (row,) = batch.slice(place, 1).to_pylist()
        except UnicodeDecodeError:
            file.bad("undecodable", line + place, "not UTF-8", conversion("GBK", "gb18030"))
            continue
        yield without_nulls(row), line + place


def _texts(file: DataFile, column: pyarrow.Array, line: int) -> Iterator[Row]:
    for number, value in enumerate(_as_bytes(file, column), line):
        text = "" if value is None else value.decode("utf-8", "surrogateescape")
        if file.usable(text, number):
            yield text, number


def _as_bytes(file: DataFile, column: pyarrow.Array) -> list[bytes | None]:
    """The values of a column of text, undecoded: one that is not UTF-8 would keep pyarrow from giving any.

    They are viewed and not cast, since a cast trusts the sizes that a damaged file gives for its nulls.
    """
    from pyarrow import types

    if types.is_null(column.type):
        return column.to_pylist()
    if types.is_dictionary(column.type):
        words = column.dictionary
        if (binary := _binary_of(words.type)) is not None:
            words = words.view(binary)
            return [None if place is None else words[place].as_py() for place in column.indices.to_pylist()]
    elif (binary := _binary_of(column.type)) is not None:
        return column.view(binary).to_pylist()
    raise file.not_text(str(column.type), None)


def _damaged(error: Exception) -> FileProblem:
    return FileProblem("unreadable file", None, f"damaged ({str(error).splitlines()[0]})", "fetch or write it again")
