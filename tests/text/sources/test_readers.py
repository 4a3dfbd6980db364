"""Files of every format are read whole, in order, with line numbers; what cannot be read is counted and named."""

from __future__ import annotations

import gzip
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from data_files import read, stop, whole_rows, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from text.corpus.corpus import Corpus
from text.corpus.documents import Cleaner
from text.sources import json_rows
from text.sources.data_file import DataFile
from text.sources.row_report import RowReport
from text.sources.text_rows import TEXT_DOCUMENT

CHINESE = "今天天气很好，我们去公园散步。"
TEXTS = ["one", CHINESE, 'with "quotes", commas\nand lines', "last"]


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
    if name == "a.jsonl":  # a wrong column ends a long file early
        corpus = Corpus(write_texts(tmp_path / name, ["x"] * 5000), "content")
        with pytest.raises(UserError, match="no column 'content'"):
            list(corpus)
        assert corpus.report.problems["no such column"] == 99 and corpus.report.files["no such column"] == 1


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


def test_what_is_above_the_limit_is_noticed_there_and_passed_over(tmp_path, monkeypatch):
    """A quote that is not closed, and a line that is too long."""
    monkeypatch.setattr(DataFile, "ROW_LIMIT", 500)
    texts = [f"row {number}" for number in range(5000)]
    (tmp_path / "a.csv").write_text("\n".join(['text\n"not closed', *texts, ""]))
    rows, counts = read(tmp_path / "a.csv")
    assert [text for text, _ in rows] == texts and counts == {"broken quote": 1}
    file = write_texts(tmp_path / "a.jsonl", ["one", "x" * 5000, "two"])
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
        ("a.csv", b'"q,a\n', "no CSV header"),
        ("a.csv", "q,a\nQ,A\n".encode("utf-16"), "UTF-16, not UTF-8; convert it with iconv -f UTF-16 -t UTF-8"),
        ("a.json", b'[\n{"a": 1},\n{"a"', ":3: the JSON array breaks off in element 2"),
        ("a.parquet", b"PAR1 half", "damaged"),
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
    assert report.examples["exact duplicate"] == ["a.csv:6"] and report.accepted == 2
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=50))
def test_seen_hashes_are_a_set(tmp_path_factory, hashes):
    cleaner, known = Cleaner(RowReport(), tmp_path_factory.getbasetemp()), set()
    for digest in hashes:
        assert cleaner._is_new(digest) == (digest not in known)
        known.add(digest)
    cleaner.close()
