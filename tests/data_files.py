"""Files of data that tests write, of every format, and what is read of them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from errors import UserError
from text.corpus.corpus import Corpus
from text.sources.registry import Source
from text.sources.row_report import RowReport
from text.sources.rows import read_rows


def write(path: Path, rows: Iterable[Any], literal: Callable[[object], str] = json.dumps) -> str:
    """A file of rows. Returns its path."""
    path.write_bytes(file_bytes(path.name, list(rows), literal))
    return str(path)


def write_texts(path: Path, texts: Iterable[str]) -> str:
    """A file of text to pretrain on. Returns its path."""
    return write(path, [{"text": text} for text in texts])


def file_bytes(name: str, rows: list[Any], literal: Callable[[object], str] = json.dumps) -> bytes:
    """Rows in the format of a name; of JSON lines, a row that is text is a line as it is.

    literal: spells lists and objects in the cells of a CSV file.
    """
    if name.lower().endswith(".gz"):
        return gzip.compress(file_bytes(name[:-3], rows, literal))
    suffix = name[name.index(".") :]
    if suffix in (".jsonl", ".ndjson"):
        return "".join(f"{row if isinstance(row, str) else spelled(row)}\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows, ensure_ascii=False, indent=1).encode()
    if suffix == ".txt":
        return "\n\n".join(map(spelled, rows)).encode()
    if suffix == ".csv":
        text = io.StringIO(newline="")
        names = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[row.get(name, "") for name in names] for row in rows]
        spell = [[literal(cell) if isinstance(cell, list | dict) else cell for cell in line] for line in cells]
        csv.writer(text).writerows([names, *spell])
        return text.getvalue().encode()
    return table(name, rows)


def spelled(row: object) -> str:
    return json.dumps(row, ensure_ascii=False)


def table(name: str, rows: list[dict[str, Any]]) -> bytes:
    """Parquet, or an Arrow stream; a file where the name says so, with text as polars writes it."""
    import pyarrow as pa

    columns = {}
    for column in dict.fromkeys(column for row in rows for column in row):
        values = [row.get(column) for row in rows]
        try:
            columns[column] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # text where the rows do not agree on a type
            columns[column] = pa.array([None if value is None else json.dumps(value) for value in values])
    made = pa.table(columns)
    if "file" in name:
        views = [field.with_type(pa.string_view()) if field.type == pa.string() else field for field in made.schema]
        made = made.cast(pa.schema(views))
    return table_bytes(name, made)


def table_bytes(name: str, made: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet

    sink = io.BytesIO()
    if name.endswith(".parquet"):
        pa.parquet.write_table(made, sink)
    else:
        opener = pa.ipc.new_file if "file" in name else pa.ipc.new_stream
        with opener(sink, made.schema) as writer:
            writer.write_table(made, max_chunksize=3)
    return sink.getvalue()


def entry(step: int, **more: object) -> dict[str, Any]:
    """A line of a run's log."""
    known = {"step": step, "tokens": 1000 * step, "seconds": step / 2, "lr": 1e-3, "tokens_per_second": 50.0}
    return {**known, "loss": 5.0 - step, **more}


def write_run(folder: Path, *entries: dict, samples: Iterable[dict] = ()) -> Path:
    """A run's folder with its log, and what its model wrote on the way. Returns it."""
    folder.mkdir(parents=True)
    write(folder / "metrics.jsonl", entries)
    write(folder / "samples.jsonl", samples)
    return folder


# What is read of them


def read(data: Path | str, **options) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """(text, line) of each document, and what was counted of rows and files."""
    corpus = Corpus(str(data), **options)
    rows = [(text, int(re.search(r":(\d+)(: element \d+)?$", place)[1])) for place, text in corpus]
    return rows, dict(corpus.report.problems + corpus.report.files)


def whole_rows(path: Path, on_error: str = "stop") -> list:
    return [row for _, row in read_rows(Source(str(path)), on_error, RowReport())]


def stop(data: Path | str, **options) -> str:
    with pytest.raises(UserError) as caught:
        list(Corpus(str(data), on_error="stop", **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)
