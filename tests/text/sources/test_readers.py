"""Corpora of every format are read whole, in order, with line numbers; what cannot be read is counted and named."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import UserError
from text.corpus.cleaning import Cleaner, SeenHashes
from text.corpus.corpus import Corpus
from text.sources.registry import Source
from text.sources.row_report import RowReport
from text.sources.rows import TEXT_DOCUMENT, read_rows

CHINESE = "今天天气很好，我们去公园散步。"


def write_csv(file: Path, texts: list[str], column: str = "text") -> Path:
    with open(file, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([[column], *([text] for text in texts)])
    return file


def read(data: Path | str, **options) -> tuple[list[tuple[str, int]], dict[str, int]]:
    corpus = Corpus(str(data), **options)
    rows = [(text, int(re.search(r":(\d+)(: element \d+)?$", place)[1])) for place, text in corpus]
    return rows, dict(corpus.report.problems + corpus.report.files)


def stop(data: Path | str, **options) -> str:
    with pytest.raises(UserError) as caught:
        list(Corpus(str(data), on_error="stop", **options))
    return str(caught.value)


TEXTS = ["one", CHINESE, 'with "quotes", commas\nand lines', "last"]


def write_as(file: Path, texts: list[str]) -> Path:
    rows = [{"text": text} for text in texts]
    suffix = file.suffixes[0]
    if suffix == ".csv":
        write_csv(file, texts)
    elif suffix in (".jsonl", ".ndjson"):
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif suffix == ".json":
        file.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    elif suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), file)
    elif suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    if file.suffix.lower() == ".gz":
        file.write_bytes(gzip.compress(file.read_bytes()))
    return file


@pytest.mark.parametrize(
    "name", ["a.csv", "a.jsonl", "a.ndjson", "a.json", "a.parquet", "a.arrow", "a.csv.GZ", "a.jsonl.gz"]
)
def test_each_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    rows, counts = read(write_as(tmp_path / name, TEXTS))
    assert [text for text, _ in rows] == TEXTS
    assert counts == {}


def test_lines_are_those_of_an_editor(tmp_path: Path) -> None:
    assert [line for _, line in read(write_as(tmp_path / "a.csv", TEXTS))[0]] == [2, 3, 4, 6]
    assert [line for _, line in read(write_as(tmp_path / "a.jsonl", TEXTS))[0]] == [1, 2, 3, 4]
    assert [line for _, line in read(write_as(tmp_path / "a.json", TEXTS))[0]] == [2, 5, 8, 11]
    assert [line for _, line in read(write_as(tmp_path / "a.parquet", TEXTS))[0]] == [1, 2, 3, 4]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=8))
def test_a_csv_round_trips_any_text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    file = write_csv(tmp_path_factory.getbasetemp() / "any.csv", texts)
    assert [text for text, _ in read(file)[0]] == texts


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=8))
def test_a_json_list_read_in_small_chunks_round_trips_any_text(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    file = write_as(tmp_path_factory.getbasetemp() / "any.json", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("text.sources.json_rows.CHUNK", 8)
        assert [text for text, _ in read(file)[0]] == texts


def test_an_arrow_file_is_read_like_a_stream(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(TEXTS).dictionary_encode(), "n": [1, 2, 3, 4]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    assert read(tmp_path / "a.arrow")[0] == list(zip(TEXTS, [1, 2, 3, 4], strict=True))


def test_an_arrow_file_that_points_outside_of_itself_is_refused(tmp_path: Path) -> None:
    """pyarrow would read memory that is not its own, and take the program with it."""
    text = pa.array(["one", "two"])
    lists, objects = pa.array([["a"], ["b"]]), pa.StructArray.from_arrays([text], ["a"])
    for number, (column, offsets) in enumerate(((text, [0, 3, 6]), (lists, [0, 1, 2]), (objects, [0, 3, 6]))):
        file = tmp_path / f"{number}.arrow"
        batch = pa.RecordBatch.from_arrays([column, pa.array(["x", "y"])], ["a", "text"])
        with pa.ipc.new_stream(str(file), batch.schema) as writer:
            writer.write_batch(batch)
        content, sound = file.read_bytes(), np.array(offsets, np.int32).tobytes()
        assert sound in content
        file.write_bytes(content.replace(sound, np.array([0, 1 << 29, 1 << 30], np.int32).tobytes()))
        assert "damaged" in stop(file)


@pytest.mark.parametrize(
    ("column", "sound", "damaged"),
    [
        (pa.array(["x" * 20, "y" * 20], pa.string_view()), [0, 20], [0, 1 << 30]),
        (pa.array([["a"], ["b", "c"]], pa.list_view(pa.string())), [0, 1], [1 << 29, 1 << 30]),
        (pa.array([["a"], ["b", "c"]], pa.large_list_view(pa.string_view())), [1, 0, 2, 0], [1, 0, 1 << 30, 0]),
        (pa.array(["x", "y"]).dictionary_encode(), [0, 1], [0, 1 << 30]),
    ],
)
def test_a_view_that_points_outside_of_its_file_is_refused(
    tmp_path: Path, column: pa.Array, sound: list[int], damaged: list[int]
) -> None:
    if pa.types.is_string_view(column.type):  # (size, first four bytes, buffer, offset) of each
        texts = np.frombuffer(column.buffers()[1], np.int32, 8).tolist()
        sound, damaged = texts, [*texts[:-1], damaged[1]]
    batch = pa.RecordBatch.from_arrays([column, pa.array(["x", "y"])], ["a", "text"])
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    content, part = (tmp_path / "a.arrow").read_bytes(), np.array(sound, np.int32).tobytes()
    place = content.rindex(part)
    broken = np.array(damaged, np.int32).tobytes()
    (tmp_path / "a.arrow").write_bytes(content[:place] + broken + content[place + len(part) :])
    assert "damaged" in stop(tmp_path / "a.arrow")


def test_plain_text_is_parted_at_blank_lines_and_at_a_length(tmp_path: Path) -> None:
    line = "x" * 999 + "\n"
    (tmp_path / "a.txt").write_text("first\nstill first\n\n\nsecond\n\n" + line * 10 + "y" * 20_000, encoding="utf-8")
    rows, _ = read(tmp_path / "a.txt")
    assert rows[:2] == [("first\nstill first", 1), ("second", 5)]
    assert rows[2] == ((line * 9).rstrip(), 7)
    assert "".join(text for text, _ in rows[3:]).replace("\n", "") == "x" * 999 + "y" * 20_000
    assert max(len(text) for text, _ in rows) < 2 * TEXT_DOCUMENT


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_csv(tmp_path / "b" / "1.csv", ["from b"])
    write_as(tmp_path / "a.jsonl", ["from a"])
    write_as(tmp_path / "c.parquet", ["from c"])
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "loop").symlink_to(tmp_path)
    rows, counts = read(tmp_path)
    assert [text for text, _ in rows] == ["from a", "from b", "from c"]
    assert counts == {} and Corpus(str(tmp_path)).report.unread == [
        f"{tmp_path}: 1 of other formats not read: README.md"
    ]


def test_several_paths_are_read_in_the_order_given(tmp_path: Path) -> None:
    b, a = write_csv(tmp_path / "b.csv", ["b"]), write_csv(tmp_path / "a.csv", ["a"])
    assert [text for text, _ in read(f"{b},{a}")[0]] == ["b", "a"]


def test_another_column_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("id,content,score\n7,words,1\n", encoding="utf-8")
    assert read(file, column="content")[0] == [("words", 2)]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet", "a.arrow"])
def test_a_missing_column_names_the_columns_there_are(tmp_path: Path, name: str) -> None:
    file = write_as(tmp_path / name, ["x"])
    with pytest.raises(UserError, match=r"a\..*no column 'content', the columns are: 'text'; name one of them"):
        read(file, column="content")


def test_a_wrong_column_ends_a_long_file_early(tmp_path: Path) -> None:
    file = write_as(tmp_path / "a.jsonl", ["x"] * 5000)
    corpus = Corpus(str(file), "content")
    with pytest.raises(UserError, match="no column 'content'"):
        list(corpus)
    assert corpus.report.problems["no such column"] == 99 and corpus.report.files["no such column"] == 1


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbf" + f"text\n{CHINESE}\n".encode())
    assert read(file)[0] == [(CHINESE, 2)]
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"text": "x"}]).encode())
    assert read(file)[0] == [("x", 1)]


@pytest.mark.parametrize(
    "name,good,bad",
    [
        ("a.csv", "text\n中\n", "天气\n"),
        ("a.jsonl", '{"text": "中"}\n', '{"text": "天气"}\n'),
        ("a.txt", "中\n\n", "天气\n\n"),
    ],
)
def test_gbk_rows_are_counted_with_place_and_remedy(tmp_path: Path, name: str, good: str, bad: str) -> None:
    file = tmp_path / name
    file.write_bytes(good.encode() + bad.encode("gbk") + good.encode().splitlines(keepends=True)[-1])
    rows, counts = read(file)
    assert "中" in {text for text, _ in rows}
    assert counts == {"undecodable": 1}
    line = good.count("\n") + 1
    assert f"{name}:{line}: not UTF-8; convert it with iconv -f GBK -t UTF-8, or pass encoding gb18030" in stop(file)


def test_a_file_in_gbk_throughout_says_what_to_do_and_reads_with_its_encoding(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(f"text\n{CHINESE}\n天气\n".encode("gb18030"))
    with pytest.raises(UserError, match=r"a.csv:2: not UTF-8; convert it with iconv -f GBK"):
        read(file)
    assert [text for text, _ in read(file, encoding="gb18030")[0]] == [CHINESE, "天气"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf16_is_named(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(f"text\n{CHINESE}\n".encode(encoding))
    assert "iconv -f UTF-16" in stop(file)
    assert read(file, encoding=encoding)[0] == [(CHINESE, 2)]


def test_an_unknown_encoding_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'gbkk' is not known"):
        Corpus(str(write_csv(tmp_path / "a.csv", ["x"])), encoding="gbkk")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.parquet"])
def test_nul_bytes_are_counted(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name == "a.parquet":
        write_as(file, ["one", "t\0wo", "three"])
    elif name == "a.jsonl":
        file.write_text('{"text": "one"}\n{"text": "t\\u0000wo"}\n{"text": "three"}\n')
    else:
        file.write_bytes(b"text\none\nt\0wo\nthree\n" if name == "a.csv" else b"one\n\nt\0wo\n\nthree\n")
    rows, counts = read(file)
    assert [text for text, _ in rows] == ["one", "three"]
    assert counts == {"NUL byte": 1}
    assert "the text holds a NUL byte; delete such bytes" in stop(file)


@pytest.mark.parametrize(
    "broken,found",
    [
        ('text\none\n"not closed\ntwo\nthree\n', ["one", "two", "three"]),  # found at the end of the file
        ('text\none\n"not closed\ntwo\n"three, quoted"\nfour\n', ["one", "two", "three, quoted", "four"]),  # at a quote
        ('text\none\n"not closed\ntwo\n", with a comma"\nfour\n', ["one", "two", ", with a comma", "four"]),
    ],
)
def test_a_broken_quote_costs_its_own_line_only(tmp_path: Path, broken: str, found: list[str]) -> None:
    file = tmp_path / "a.csv"
    file.write_text(broken)
    rows, counts = read(file)
    assert [text for text, _ in rows] == found
    assert sum(counts.values()) == 1
    assert "a.csv:3: " in stop(file)


def test_a_broken_quote_in_a_large_file_is_noticed_at_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('text\n"not closed\n' + "".join(f"row {number}\n" for number in range(5000)))
    rows, counts = read(file, row_limit=1000)
    assert [text for text, _ in rows] == [f"row {number}" for number in range(5000)]
    assert counts == {"broken quote": 1}
    assert "a.csv:2: a quote that is not closed" in stop(file, row_limit=1000)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.sampled_from('ab ",\n中'), max_size=6), min_size=1, max_size=6),
    st.integers(0, 5),
)
def test_rows_before_a_broken_quote_are_never_lost(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], place: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "broken.csv"
    place = min(place, len(texts))
    write_csv(file, texts[:place])
    content = file.read_text(encoding="utf-8") + '"open\n'
    write_csv(file, texts[place:])
    file.write_text(content + file.read_text(encoding="utf-8").partition("\n")[2], encoding="utf-8")
    rows, counts = [], {}
    if texts[:place]:
        rows, counts = read(file)
        assert [text for text, _ in rows][:place] == [text for text in texts[:place]]
        assert counts or len(rows) > place


def test_a_row_of_commas_without_quotes_is_counted_not_cut(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text\nfine\nhello, world\n")
    assert read(file) == ([("fine", 2)], {"field count": 1})
    assert "a.csv:3: 2 fields where the header has 1; put text with commas" in stop(file)


def test_a_carriage_return_in_a_row_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"text\nfine\nold\rmac\nmore\r\n")
    assert read(file) == ([("fine", 2), ("more", 4)], {"stray carriage return": 1})
    assert "a.csv:3: a carriage return" in stop(file)


def test_half_a_json_line_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": "ha\n\n[1]\n{"text": 5}\n{"text": null}\n{"text": "last"}\n{"tex')
    rows, counts = read(file)
    assert rows == [("one", 1), ("", 6), ("last", 7)]
    assert counts == {"broken JSON": 2, "not an object": 1, "not text": 1}
    assert "a.jsonl:2: broken JSON" in stop(file)


def test_half_a_surrogate_pair_is_undecodable(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d"}\n{"text": "fine"}\n')
    assert read(tmp_path / "a.jsonl") == ([("fine", 2)], {"undecodable": 1})


def test_a_json_list_that_breaks_off_gives_what_was_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[\n{"text": "one"},\n{"text": "two"},\n{"text": "thr')
    rows, counts = read(file)
    assert [text for text, _ in rows] == ["one", "two"]
    assert counts == {"broken JSON": 1}
    message = stop(file)
    assert "a.json:4: the JSON array breaks off in element 3 (Unterminated string" in message


def test_a_line_above_the_limit_is_counted_and_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": "%s"}\n{"text": "two"}\n' % ("x" * 5000))
    assert read(file, row_limit=500) == ([("one", 1), ("two", 3)], {"too long": 1})
    assert "a.jsonl:2: a line of 500 characters or more" in stop(file, row_limit=500)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.txt", "a.csv.gz"])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="is empty; name a file that has rows"):
        read(tmp_path / name)
    write_csv(tmp_path / "good.csv", ["x"])
    assert read(tmp_path)[1] == {"empty file": 1}


def test_a_header_without_rows_is_an_empty_file(tmp_path: Path) -> None:
    assert "is empty; name a file" in stop(write_csv(tmp_path / "a.csv", []))


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match="the folder has no data; put files of"):
        Corpus(str(tmp_path))


def test_an_unknown_suffix_and_a_missing_path_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a.docx: a format that is not read; give one of .csv"):
        Corpus(str(tmp_path / "a.docx"))
    with pytest.raises(UserError, match=r"none.csv: no such file or folder"):
        Corpus(str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match="names nothing"):
        Corpus(" , ")
    with pytest.raises(UserError, match="must be 'skip' or 'stop'"):
        Corpus(str(tmp_path), on_error="ignore")


def test_a_path_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("os.scandir", refuse)  # the tests may run as a user who may read everything
    with pytest.raises(UserError, match="Permission denied; check the path and its permissions"):
        Corpus(str(tmp_path))


@pytest.mark.parametrize("name", ["b.parquet", "b.arrow", "b.csv.gz"])
def test_a_truncated_file_is_counted_and_the_others_are_read(tmp_path: Path, name: str) -> None:
    write_as(tmp_path / name, [f"{number} {CHINESE}" for number in range(500)])
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    write_csv(tmp_path / "a.csv", ["good"])
    rows, counts = read(tmp_path)
    assert rows[0] == ("good", 2)
    assert counts == {"unreadable file": 1}
    assert f"{name}: " in stop(tmp_path / name)


def test_a_table_column_of_numbers_is_named(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert "a.parquet:1: column 'text' holds int; name a column of text" in stop(tmp_path / "a.parquet")


def test_a_table_row_that_is_not_utf8_costs_only_itself(tmp_path: Path) -> None:
    values = pa.array([b"one", "天气".encode("gbk"), b"two"], pa.binary()).view(pa.string())
    pa.parquet.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ([("one", 1), ("two", 3)], {"undecodable": 1})


def test_a_hub_name_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*arguments: object, **options: object) -> datasets.IterableDataset:
        asked.append((arguments, options))
        return datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("someone/corpus:zh")[0] == list(zip(TEXTS, [1, 2, 3, 4], strict=True))
    assert asked == [(("someone/corpus", "zh"), {"split": "train", "streaming": True})]
    with pytest.raises(UserError, match=r"someone/corpus:1: no column 'content', the columns are: 'text'"):
        read("someone/corpus", column="content")


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nwith details")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"^nobody/nothing: no such path here, and the Hub does not give it \(Couldn't"):
        read("nobody/nothing")


def test_the_position_grows_to_the_size(tmp_path: Path) -> None:
    corpus = Corpus(str(write_csv(tmp_path / "a.csv", ["a", "b"] * 2000)))
    positions = [corpus.report.bytes_read for _ in corpus]
    assert positions == sorted(positions) and 0 < positions[-1] <= corpus.report.bytes_read == corpus.size


def test_cleaning_keeps_each_text_once_and_counts_the_rest(tmp_path: Path) -> None:
    report = RowReport()
    seen = SeenHashes(tmp_path)
    cleaner = Cleaner(report, seen, min_chars=3)
    texts = ["good", "", " \n", "no", "good", CHINESE]
    kept = [cleaner.accept(f"a.csv:{line}", text) for line, text in enumerate(texts, 2)]
    seen.close()
    assert [item and item[1].decode() for item in kept] == ["good", None, None, None, None, CHINESE]
    assert report.problems == {"empty": 2, "shorter than 3 characters": 1, "exact duplicate": 1}
    assert report.examples["exact duplicate"] == ["a.csv:6"]
    assert report.kept == 2
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=50))
def test_seen_hashes_are_a_set(tmp_path_factory: pytest.TempPathFactory, hashes: list[int]) -> None:
    seen, known = SeenHashes(tmp_path_factory.getbasetemp()), set()
    for digest in hashes:
        assert seen.add(digest) == (digest not in known)
        known.add(digest)
    seen.close()


TEXT_TYPES = {
    "string_view": pa.string_view(),
    "large_string": pa.large_string(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of large_string": pa.dictionary(pa.uint8(), pa.large_string()),
    "dictionary of string_view": pa.dictionary(pa.int8(), pa.string_view()),  # polars' categories
}


def column_of(kind: pa.DataType, texts: list) -> pa.Array:
    if not pa.types.is_dictionary(kind):
        return pa.array(texts, pa.string()).cast(kind)
    words = sorted({text for text in texts if text is not None})
    places = pa.array([None if text is None else words.index(text) for text in texts], kind.index_type)
    return pa.DictionaryArray.from_arrays(places, pa.array(words).cast(kind.value_type))


def write_table(file: Path, table: pa.Table) -> Path:
    if file.suffix == ".parquet":
        pa.parquet.write_table(table, file)
    else:
        opener = pa.ipc.new_stream if "stream" in file.name else pa.ipc.new_file
        with opener(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return file


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow", "a.parquet"])
@pytest.mark.parametrize("kind", TEXT_TYPES)
def test_every_type_of_text_is_read(kind: str, name: str, tmp_path: Path) -> None:
    texts = [*TEXTS, None, "x" * 100]
    if name == "a.parquet" and kind == "dictionary of string_view":
        kind = "dictionary"  # which is what Parquet makes of it
    file = write_table(tmp_path / name, pa.table({"n": range(6), "text": column_of(TEXT_TYPES[kind], texts)}))
    assert read(file)[0] == [(text or "", line) for line, text in enumerate(texts, 1)]
    rows = [row for _, row in read_rows(Source(str(file)), "stop", RowReport())]
    assert [row.get("text") for row in rows] == texts and "text" not in rows[4]


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow"])
@pytest.mark.parametrize(
    "lists", [pa.large_list, pa.list_view, pa.large_list_view, lambda kind: pa.list_(kind, 2)], ids=range(4)
)
@pytest.mark.parametrize(
    "kind", [pa.string_view(), pa.large_string(), pa.struct([("role", pa.string_view())])], ids=str
)
def test_every_type_of_list_is_read(kind: pa.DataType, lists: object, name: str, tmp_path: Path) -> None:
    inner = [{"role": "u"}, {"role": "a" * 50}] if pa.types.is_struct(kind) else ["u", "a" * 50]
    file = write_table(tmp_path / name, pa.table({"turns": pa.array([inner, inner[::-1], inner], lists(kind))}))
    assert [row["turns"] for _, row in read_rows(Source(str(file)), "stop", RowReport())] == [
        inner, inner[::-1], inner,
    ]  # fmt: skip


def test_a_text_view_that_is_not_utf8_costs_only_its_row(tmp_path: Path) -> None:
    bad = pa.array([b"one", "天气".encode("gbk"), b"two"], pa.binary_view()).view(pa.string_view())
    words = pa.DictionaryArray.from_arrays([0, 1, 2], pa.array([b"one", b"\xcc", b"two"]).view(pa.string()))
    for name, column in (("view", bad), ("dictionary", words)):
        file = write_table(tmp_path / f"{name}.arrow", pa.table({"text": column}))
        assert read(file) == ([("one", 1), ("two", 3)], {"undecodable": 1})
        report = RowReport()
        assert [row["text"] for _, row in read_rows(Source(str(file)), "skip", report)] == ["one", "two"]
        assert report.problems == {"undecodable": 1}


def test_nan_of_a_table_is_missing(tmp_path: Path) -> None:
    file = write_table(tmp_path / "a.parquet", pa.table({"text": ["x", "y"], "score": [float("nan"), 0.5]}))
    assert [row for _, row in read_rows(Source(str(file)), "stop", RowReport())] == [
        {"text": "x"}, {"text": "y", "score": 0.5},
    ]  # fmt: skip


@pytest.mark.parametrize(("line", "mark"), [("sep=;", ";"), ("sep=,", ","), ("SEP=\t", "\t"), ('"sep=|"', "|")])
def test_the_separator_that_a_first_line_names_is_obeyed(line: str, mark: str, tmp_path: Path) -> None:
    rows = [f"id{mark}text", f'1{mark}"a{mark} b"', f"2{mark}c"]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([line, *rows]).encode())
    assert read(tmp_path / "a.csv") == ([(f"a{mark} b", 3), ("c", 4)], {})
    assert [row for _, row in read_rows(Source(str(tmp_path / "a.csv")), "stop", RowReport())] == [
        {"id": "1", "text": f"a{mark} b"}, {"id": "2", "text": "c"},
    ]  # fmt: skip
    assert "a.csv:2: no column 'words'" in stop(tmp_path / "a.csv", column="words")
