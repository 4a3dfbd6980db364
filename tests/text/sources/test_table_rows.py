"""Parquet and Arrow files with text of every type, and damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_files import read, stop, table_bytes, whole_rows

from errors import UserError

TEXTS = ["one", "今天天气很好", 'with "quotes", commas\nand lines', "last"]


def write_table(path: Path, made: pa.Table) -> Path:
    path.write_bytes(table_bytes(path.name, made))
    return path


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("as_words", [False, True])
def test_a_table_row_that_is_not_utf8_costs_only_itself(name, as_words, tmp_path):
    values = pa.array([b"one", "天气".encode("gbk"), b"two", b"t\0hree"], pa.binary()).view(pa.string())
    column = pa.DictionaryArray.from_arrays(list(range(4)), values) if as_words and "arrow" in name else values
    file = write_table(tmp_path / name, pa.table({"text": column, "n": range(4)}))
    assert read(file) == ([("one", 1), ("two", 3)], {"undecodable": 1, "NUL byte": 1})
    assert [row["text"] for row in whole_rows(file, "skip")] == ["one", "two", "t\0hree"]


def test_a_table_column_of_numbers_is_named(tmp_path):
    file = write_table(tmp_path / "a.parquet", pa.table({"text": range(200)}))
    assert "a.parquet:1: column 'text' holds int; name a column of text" in stop(file)
    with pytest.raises(UserError, match="column 'text' holds int"):
        read(file)


# What points outside of its file: pyarrow would read memory that is not its own, and take the program with it.
LISTS = pa.array([["a"], ["b"]])
OUTSIDE = [
    (pa.array(["one", "two"]), [0, 3, 6], [0, 1 << 29, 1 << 30]),
    (LISTS, [0, 1, 2], [0, 1 << 29, 1 << 30]),
    (pa.StructArray.from_arrays([pa.array(["one", "two"])], ["a"]), [0, 3, 6], [0, 1 << 29, 1 << 30]),
    (pa.array(["x" * 20, "y" * 20], pa.string_view()), None, 1 << 30),
    (pa.array([["a"], ["b", "c"]], pa.list_view(pa.string())), [0, 1], [1 << 29, 1 << 30]),
    (pa.array([["a"], ["b", "c"]], pa.large_list_view(pa.string_view())), [1, 0, 2, 0], [1, 0, 1 << 30, 0]),
    (pa.array(["x", "y"]).dictionary_encode(), [0, 1], [0, 1 << 30]),
]


@pytest.mark.parametrize(("column", "sound", "damaged"), OUTSIDE, ids=[str(column.type) for column, _, _ in OUTSIDE])
def test_an_arrow_file_that_points_outside_of_itself_is_refused(tmp_path, column, sound, damaged):
    if sound is None:  # (size, first four bytes, buffer, offset) of each text
        sound = np.frombuffer(column.buffers()[1], np.int32, 8).tolist()
        damaged = [*sound[:-1], damaged]
    file = write_table(tmp_path / "stream.arrow", pa.table({"a": column, "text": ["x", "y"]}))
    content, part = file.read_bytes(), np.array(sound, np.int32).tobytes()
    place = content.rindex(part)
    file.write_bytes(content[:place] + np.array(damaged, np.int32).tobytes() + content[place + len(part) :])
    assert "damaged" in stop(file)


TEXT_TYPES = {
    "string_view": pa.string_view(),
    "large_string": pa.large_string(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of large_string": pa.dictionary(pa.uint8(), pa.large_string()),
    "dictionary of string_view": pa.dictionary(pa.int8(), pa.string_view()),  # polars' categories
}


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow", "a.parquet"])
@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_every_type_of_text_is_read(kind, name, tmp_path):
    texts, kind = [*TEXTS, None, "x" * 100], TEXT_TYPES[kind]
    if name == "a.parquet" and kind == TEXT_TYPES["dictionary of string_view"]:
        kind = TEXT_TYPES["dictionary"]  # which is what Parquet makes of it
    if pa.types.is_dictionary(kind):
        words = sorted({text for text in texts if text is not None})
        places = pa.array([None if text is None else words.index(text) for text in texts], kind.index_type)
        column = pa.DictionaryArray.from_arrays(places, pa.array(words).cast(kind.value_type))
    else:
        column = pa.array(texts, pa.string()).cast(kind)
    file = write_table(tmp_path / name, pa.table({"n": [float("nan"), *range(5)], "text": column}))
    assert read(file)[0] == [(text or "", line) for line, text in enumerate(texts, 1)]
    rows = whole_rows(file)
    assert [row.get("text") for row in rows] == texts and "text" not in rows[4] and "n" not in rows[0]


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow"])
@pytest.mark.parametrize(
    "lists", [pa.large_list, pa.list_view, pa.large_list_view, lambda kind: pa.list_(kind, 2)], ids=range(4)
)
@pytest.mark.parametrize(
    "kind", [pa.string_view(), pa.large_string(), pa.struct([("role", pa.string_view())])], ids=str
)
def test_every_type_of_list_is_read(kind, lists, name, tmp_path):
    inner = [{"role": "u"}, {"role": "a" * 50}] if pa.types.is_struct(kind) else ["u", "a" * 50]
    turns = [inner, inner[::-1], inner]
    file = write_table(tmp_path / name, pa.table({"turns": pa.array(turns, lists(kind))}))
    assert [row["turns"] for row in whole_rows(file)] == turns
