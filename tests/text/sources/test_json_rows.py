"""JSON is read as what it is, whatever its name: lines, lists, objects; a few rows at a time."""

from __future__ import annotations

import json

import pytest
from data_files import read, stop, whole_rows

from text.corpus.corpus import Corpus
from text.sources import json_rows
from text.sources.data_file import DataFile
from text.sources.registry import Source
from text.sources.row_report import RowReport
from text.sources.rows import read_rows

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
    ],
)
def test_what_cannot_be_read_to_its_end_is_one_line(content, what, tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "CHUNK", 100)
    monkeypatch.setattr(DataFile, "ROW_LIMIT", 1000)
    (tmp_path / "a.json").write_text(content)
    assert f"a.json{what}" in stop(tmp_path / "a.json")


@pytest.mark.parametrize("layout", ["a list", "a pretty list", "a list in an object", "pretty rows", "lines"])
def test_no_more_of_a_file_is_read_than_its_first_rows_need(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "CHUNK", 1000)
    monkeypatch.setattr(DataFile, "ROW_LIMIT", 2000)
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
