"""Files of every format are read whole, in order, with line numbers; what cannot be read is counted and named."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from data_files import table_bytes, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from text.corpus.corpus import Cleaner, Corpus
from text.sources import data_file, json_rows
from text.sources.data_file import DataFile
from text.sources.registry import Source
from text.sources.row_report import RowReport
from text.sources.rows import TEXT_DOCUMENT, read_rows

CHINESE = "今天天气很好，我们去公园散步。"
TEXTS = ["one", CHINESE, 'with "quotes", commas\nand lines', "last"]


def write_table(path: Path, made: pa.Table) -> Path:
    path.write_bytes(table_bytes(path.name, made))
    return path


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


LINES = {
    "a.csv": [2, 3, 4, 6], "a.jsonl": [1, 2, 3, 4], "a.ndjson": [1, 2, 3, 4], "a.json": [2, 5, 8, 11],
    "a.parquet": [1, 2, 3, 4], "stream.arrow": [1, 2, 3, 4], "file.arrow": [1, 2, 3, 4], "a.csv.GZ": [2, 3, 4, 6],
    "a.jsonl.gz": [1, 2, 3, 4],
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_each_format_gives_the_same_documents_with_an_editor_s_lines(tmp_path, name):
    file = write_texts(tmp_path / name, TEXTS)
    assert read(file) == (list(zip(TEXTS, LINES[name], strict=True)), {})
    with pytest.raises(UserError, match=r"\w+\..*no column 'content', the columns are: 'text'; name one of them"):
        read(file, column="content")


ANY = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=8)


@pytest.mark.parametrize("name", ["any.csv", "any.json"])
@settings(max_examples=50, deadline=None)
@given(texts=ANY)
def test_any_text_comes_back(tmp_path_factory, name, texts):
    file = write_texts(tmp_path_factory.getbasetemp() / name, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK", 8)
        assert [text for text, _ in read(file)[0]] == texts


GBK = "convert it with iconv -f GBK -t UTF-8, or pass encoding gb18030"
NUL = "the text holds a NUL byte; delete such bytes"
TWO = '{"text": "one"}\n{"text": "two"}\n'
BROKEN = {  # name of the file, its content, (text, line) of what is read, what is counted, the error of "stop"
    "GBK in CSV": ("a.csv", "text\n中\n".encode() + "天气\n".encode("gbk") + "文\n".encode(), [("中", 2), ("文", 4)],
                   {"undecodable": 1}, f":3: not UTF-8; {GBK}"),
    "GBK in JSON": ("a.jsonl", '{"text": "天气"}\n'.encode("gbk") + '{"text": "中"}\n'.encode(), [("中", 2)],
                    {"undecodable": 1}, f":1: not UTF-8; {GBK}"),
    "GBK in text": ("a.txt", "中\n\n".encode() + "天气\n\n".encode("gbk"), [("中", 1)],
                    {"undecodable": 1}, f":3: not UTF-8; {GBK}"),
    "NUL in CSV": ("a.csv", b"text\none\nt\0wo\nthree\n", [("one", 2), ("three", 4)], {"NUL byte": 1}, f":3: {NUL}"),
    "NUL in JSON": ("a.jsonl", b'{"text": "t\\u0000wo"}\n{"text": "x"}\n', [("x", 2)], {"NUL byte": 1}, f":1: {NUL}"),
    "NUL in text": ("a.txt", b"one\n\nt\0wo\n\nthree\n", [("one", 1), ("three", 5)], {"NUL byte": 1}, f":3: {NUL}"),
    "half a character": ("a.jsonl", b'{"text": "\\ud83d"}\n{"text": "x"}\n', [("x", 2)], {"undecodable": 1}, ":1: not"),
    "quote at the end": ("a.csv", b'text\none\n"not closed\ntwo\nthree\n', [("one", 2), ("two", 4), ("three", 5)],
                         {"broken quote": 1}, ":3: a quote that is not closed"),
    "quote at a quote": ("a.csv", b'text\none\n"not closed\ntwo\n"three, quoted"\n',
                         [("one", 2), ("two", 4), ("three, quoted", 5)], {"broken quote": 1}, ":3: a quote"),
    "quote and a comma": ("a.csv", b'text\none\n"not closed\ntwo\n", with a comma"\nfour\n',
                          [("one", 2), ("two", 4), (", with a comma", 5), ("four", 6)], {"field count": 1}, ":3: "),
    "commas": ("a.csv", b"text\nfine\nhello, world\n", [("fine", 2)], {"field count": 1},
               ":3: 2 fields where the header has 1; put text with commas"),
    "carriage return": ("a.csv", b"text\nfine\nold\rmac\nmore\r\n", [("fine", 2), ("more", 4)],
                        {"stray carriage return": 1}, ":3: a carriage return"),
    "half a line": ("a.jsonl", b'{"text": "one"}\n{"text": "ha\n\n[1]\n{"text": 5}\n{"text": null}\n{"text": "x"}\n{"',
                    [("one", 1), ("", 6), ("x", 7)], {"broken JSON": 2, "not an object": 1, "not text": 1},
                    ":2: broken JSON"),
    **{f"first line {broken}": ("a.jsonl", f"{broken}\n{TWO}".encode(), [("one", 2), ("two", 3)], {"broken JSON": 1},
                                ":1: broken JSON")
       for broken in ('{"text": "ha', '{"text": "x",', "{", '{"text":"x"} trailing', "天气")},
    "half a list": ("a.json", b'[\n{"text": "one"},\n{"text": "two"},\n{"text": "thr', [("one", 2), ("two", 3)],
                    {"broken JSON": 1}, ":4: the JSON array breaks off in element 3 (Unterminated string"),
    "after a list": ("a.json", b'[{"text": "one"}] x', [("one", 1)], {"broken JSON": 1}, ":1: text follows the end"),
    "byte order mark": ("a.csv", b"\xef\xbb\xbftext\nx\n", [("x", 2)], {}, None),
    "the same in JSON": ("a.json", b'\xef\xbb\xbf[{"text": "x"}]', [("x", 1)], {}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_costs_only_itself_and_is_named(kind, tmp_path):
    name, content, rows, counts, message = BROKEN[kind]
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == (rows, counts)
    assert message is None or f"{name}{message}" in stop(tmp_path / name)


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


def test_a_wrong_column_ends_a_long_file_early(tmp_path):
    corpus = Corpus((write_texts(tmp_path / "a.jsonl", ["x"] * 5000)), "content")
    with pytest.raises(UserError, match="no column 'content'"):
        list(corpus)
    assert corpus.report.problems["no such column"] == 99 and corpus.report.files["no such column"] == 1


def test_a_broken_quote_in_a_large_file_is_noticed_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(data_file, "ROW_LIMIT", 1000)
    texts = [f"row {number}" for number in range(5000)]
    (tmp_path / "a.csv").write_text("\n".join(['text\n"not closed', *texts, ""]))
    rows, counts = read(tmp_path / "a.csv")
    assert [text for text, _ in rows] == texts and counts == {"broken quote": 1}


def test_a_line_above_the_limit_is_counted_and_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(data_file, "ROW_LIMIT", 500)
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": "%s"}\n{"text": "two"}\n' % ("x" * 5000))
    assert read(file) == ([("one", 1), ("two", 3)], {"too long": 1})
    assert "a.jsonl:2: a line of 500 characters or more" in stop(file)


@pytest.mark.parametrize(("line", "mark"), [("sep=;", ";"), ("sep=,", ","), ("SEP=\t", "\t"), ('"sep=|"', "|")])
def test_the_separator_that_a_first_line_names_is_obeyed(line, mark, tmp_path):
    rows = [f"id{mark}text", f'1{mark}"a{mark} b"', f"2{mark}c"]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([line, *rows]).encode())
    assert read(tmp_path / "a.csv") == ([(f"a{mark} b", 3), ("c", 4)], {})
    assert whole_rows(tmp_path / "a.csv") == [{"id": "1", "text": f"a{mark} b"}, {"id": "2", "text": "c"}]
    assert "a.csv:2: no column 'words'" in stop(tmp_path / "a.csv", column="words")


def test_other_encodings_are_named_and_read(tmp_path):
    file = tmp_path / "a.csv"
    for encoding, message in (
        ("gb18030", "a.csv:2: not UTF-8; convert it with iconv -f GBK"),
        ("utf-16", "iconv -f UTF-16"),
        ("utf-16-le", "iconv -f UTF-16"),
    ):
        file.write_bytes(f"text\n{CHINESE}\n".encode(encoding))
        assert message in stop(file) and read(file, encoding=encoding)[0] == [(CHINESE, 2)]
    with pytest.raises(UserError, match="'gbkk' is not known"):
        Corpus(str(file), encoding="gbkk")


def test_plain_text_is_cut_at_blank_lines_and_at_a_length(tmp_path):
    line = "x" * 999 + "\n"
    (tmp_path / "a.txt").write_text("first\nstill first\n\n\nsecond\n\n" + line * 10 + "y" * 20_000, encoding="utf-8")
    rows, _ = read(tmp_path / "a.txt")
    assert rows[:3] == [("first\nstill first", 1), ("second", 5), ((line * 9).rstrip(), 7)]
    assert "".join(text for text, _ in rows[3:]).replace("\n", "") == "x" * 999 + "y" * 20_000
    assert max(len(text) for text, _ in rows) < 2 * TEXT_DOCUMENT


def test_a_folder_is_read_recursively_and_several_paths_in_their_order(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/1.csv", "a.jsonl", "c.parquet"):
        write_texts(tmp_path / name, [name])
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "loop").symlink_to(tmp_path)
    corpus = Corpus(str(tmp_path))
    assert [text for _, text in corpus] == ["a.jsonl", "b/1.csv", "c.parquet"] and not corpus.report.problems
    assert corpus.report.unread == [f"{tmp_path}: 1 of other formats not read: README.md"]
    both = f"{tmp_path / 'c.parquet'},{tmp_path / 'a.jsonl'}"
    assert [text for text, _ in read(both)[0]] == ["c.parquet", "a.jsonl"]


@pytest.mark.parametrize("content", [b"", b"text\n"], ids=["nothing", "header"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt", "a.csv.gz"])
def test_an_empty_file_is_named(tmp_path, name, content):
    if content == b"text\n" and ".csv" not in name:
        content = b" "
    (tmp_path / name).write_bytes(gzip.compress(content) if content and name.endswith("gz") else content)
    with pytest.raises(UserError, match="is empty; name a file that has rows"):
        read(tmp_path / name)
    write_texts(tmp_path / "good.csv", ["x"])
    assert read(tmp_path) == ([("x", 2)], {"empty file": 1})


def test_paths_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.docx").write_bytes(b"x")
    for data, what in (
        (tmp_path, "the folder has no data; put files of"),
        (tmp_path / "a.docx", "a.docx: a format that is not read; give one of .csv"),
        (tmp_path / "none.csv", "none.csv: no such file or folder"),
        (" , ", "names nothing"),
    ):
        with pytest.raises(UserError, match=what):
            Corpus(str(data))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("os.scandir", refuse)  # the tests may run as a user who may read everything
    with pytest.raises(UserError, match="Permission denied; check the path and its permissions"):
        Corpus(str(tmp_path))


@pytest.mark.parametrize("name", ["b.parquet", "b.arrow", "b.csv.gz"])
def test_a_truncated_file_is_counted_and_the_others_are_read(tmp_path, name):
    write_texts(tmp_path / name, [f"{number} {CHINESE}" for number in range(500)])
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    write_texts(tmp_path / "a.csv", ["good"])
    rows, counts = read(tmp_path)
    assert rows[0] == ("good", 2) and counts == {"unreadable file": 1}
    assert f"{name}: " in stop(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", b"", "is empty; name a file that has rows"),
        ("a.json", b"[]", "is empty; name a file that has rows"),
        ("a.csv", b'"q,a\n', "no CSV header"),
        ("a.csv", "q,a\nQ,A\n".encode("utf-16"), "UTF-16, not UTF-8; convert it with iconv -f UTF-16 -t UTF-8"),
        ("a.json", b'[\n{"a": 1},\n{"a"', ":3: the JSON array breaks off in element 2"),
        ("a.json", b'[{"a": 1}]\n{"a": 1}', "text follows the end of the JSON array"),
        ("a.parquet", b"PAR1 half", "damaged"),
        ("a.arrow", b"ARROW1 half", "damaged"),
        ("a.csv.gz", gzip.compress(b"q,a\nQ,A\n" * 99, mtime=0)[:30], "cannot be read"),
        ("a.jsonl.gz", b'{"q": "Q", "a": "A"}\n', "cannot be read (Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"q": "Q"}\n' * 99, mtime=0)[:12] + b"\xff" * 30, "cannot be read"),
    ],
)
def test_rows_of_a_file_that_cannot_be_read_to_its_end_stop_even_when_rows_are_skipped(name, content, what, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(what)) as caught:
        whole_rows(tmp_path / name, "skip")
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


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


def test_the_hub_is_streamed_or_refused_in_one_line(monkeypatch):
    def load(name: str, subset: str | None, **options: object) -> Iterator[dict]:
        if name != "someone/corpus":
            raise ConnectionError("Couldn't reach the Hub\nwith details")
        return ({"text": text} for text in TEXTS)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    assert read("someone/corpus:zh")[0] == list(zip(TEXTS, [1, 2, 3, 4], strict=True))
    with pytest.raises(UserError, match=r"someone/corpus:1: no column 'content', the columns are: 'text'"):
        read("someone/corpus", column="content")
    with pytest.raises(UserError, match=r"^nobody/nothing: no such path here, and the Hub does not give it \(Couldn't"):
        read("nobody/nothing")


def test_the_bytes_read_grow_to_the_size(tmp_path):
    corpus = Corpus(write_texts(tmp_path / "a.csv", ["a", "b"] * 2000))
    read_bytes = [corpus.report.bytes_read for _ in corpus]
    assert read_bytes == sorted(read_bytes) and 0 < read_bytes[-1] <= corpus.report.bytes_read == corpus.size


def test_cleaning_keeps_each_text_once_and_counts_the_rest(tmp_path):
    report = RowReport()
    cleaner = Cleaner(report, tmp_path, min_chars=3)
    texts = ["good", "", " \n", "no", "good", CHINESE]
    kept = [cleaner.accept(f"a.csv:{line}", text) for line, text in enumerate(texts, 2)]
    cleaner.close()
    assert [item and item[1].decode() for item in kept] == ["good", None, None, None, None, CHINESE]
    assert report.problems == {"empty": 2, "shorter than 3 characters": 1, "exact duplicate": 1}
    assert report.examples["exact duplicate"] == ["a.csv:6"] and report.kept == 2
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=50))
def test_seen_hashes_are_a_set(tmp_path_factory, hashes):
    cleaner, known = Cleaner(RowReport(), tmp_path_factory.getbasetemp()), set()
    for digest in hashes:
        assert cleaner._is_new(digest) == (digest not in known)
        known.add(digest)
    cleaner.close()


# JSON is read as what it is, whatever its name

ROWS = [{"text": "one", "n": {"x": [1, {"y": "}"}]}}, {"text": "二\n]", "n": None}, {"text": "three"}]
LAYOUTS = {
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
    "a list": json.dumps(ROWS),
    "a pretty list": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "pretty rows": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "pretty rows with commas": ",\n".join(json.dumps(row, indent=2) for row in ROWS),
    "rows over two lines": "".join(json.dumps(row).replace(", ", ",\n", 1) + "\n" for row in ROWS),
    "a list in an object": json.dumps({"version": "1.0", "about": {"data": [1]}, "data": ROWS, "more": [1]}),
    "a pretty list in an object": "\n\n" + json.dumps({"type": "x", "instances": ROWS}, indent=4),
    "a line a row in an object": '{"data": [\n' + ",\n".join(map(json.dumps, ROWS)) + "\n]}\n",
    "one pretty row": json.dumps(ROWS[0], indent=2),
    "one row": json.dumps(ROWS[0]),
    "one row with a list": json.dumps({**ROWS[0], "data": ["text", "text"]}, indent=1),
    "one row with a conversation": json.dumps({**ROWS[0], "data": [{"role": "user", "content": "Q"}]}, indent=1),
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [8, json_rows.CHUNK])
def test_each_layout_is_recognised(layout, name, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "CHUNK", chunk)
    (tmp_path / name).write_text(LAYOUTS[layout], encoding="utf-8")
    found = whole_rows(tmp_path / name)
    assert [row["text"] for row in found] == [row["text"] for row in (ROWS[:1] if "one" in layout else ROWS)]
    assert found[0]["n"] == ROWS[0]["n"]
    assert [text for text, _ in read(tmp_path / name)[0]] == [row["text"] for row in found]


def test_rows_have_the_lines_they_begin_at(tmp_path):
    path = tmp_path / "a.json"
    for layout, places in (
        ("pretty rows", [":1", ":12", ":16"]),
        ("a line a row in an object", [":2: element 1", ":3: element 2", ":4: element 3"]),
        ("a list", [":1: element 1", ":1: element 2", ":1: element 3"]),
    ):
        path.write_text(LAYOUTS[layout], encoding="utf-8")
        found = [place for place, _ in read_rows(Source(str(path)), "stop", RowReport())]
        assert found == [f"{path}{place}" for place in places] == [place for place, _ in Corpus(str(path))]


def test_nan_is_missing_and_other_numbers_are_not(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": NaN, "n": [NaN, -Infinity, 1.5]}\n{"text": "x", "n": null}\n')
    assert whole_rows(tmp_path / "a.jsonl") == [
        {"text": None, "n": [None, float("-inf"), 1.5]},
        {"text": "x", "n": None},
    ]
    assert read(tmp_path / "a.jsonl")[0] == [("", 1), ("x", 2)]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{\n"text": "x"\n}\n{\n"text": y\n}', ":5: broken JSON (Expecting value); fix it"),
        ('{"data": [\n{"text": "x"},\n{"text": y}]}', ":3: the JSON array breaks off in element 2 (Expecting value"),
        ('{\n"text": "' + "x" * 2000 + '"\n}', ":1: an object of more than 1,000 characters; write it as rows"),
        ('[{"text": "' + "x" * 2000 + '"}]', ":1: an object of more than 1,000 characters; write it as rows"),
        ('{"text": "' + "x" * 2000 + '"}', ":1: a line of 1,000 characters or more; break it into rows"),
    ],
)
def test_what_cannot_be_read_to_its_end_is_one_line(content, what, tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "CHUNK", 100)
    monkeypatch.setattr(data_file, "ROW_LIMIT", 1000)
    (tmp_path / "a.json").write_text(content)
    assert f"a.json{what}" in stop(tmp_path / "a.json")


@pytest.mark.parametrize("layout", ["a list", "a pretty list", "a list in an object", "pretty rows", "lines"])
def test_no_more_of_a_file_is_read_than_its_first_rows_need(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "CHUNK", 1000)
    monkeypatch.setattr(data_file, "ROW_LIMIT", 2000)
    rows = [{"text": "x" * 50}] * 5000
    whole = {
        "a list": json.dumps(rows),
        "a pretty list": json.dumps(rows, indent=1),
        "a list in an object": json.dumps({"data": rows}),
        "pretty rows": "\n".join(json.dumps(row, indent=1) for row in rows),
        "lines": "\n".join(map(json.dumps, rows)),
    }[layout]
    (tmp_path / "a.json").write_text(whole)
    file = DataFile(tmp_path / "a.json", RowReport(), "text")
    next(json_rows.json_rows(file))
    assert file.position < 20_000 < len(whole)
