"""C-Eval, CMMLU and MMLU are read from their folders and from the Hub, and a bad row is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from errors import UserError
from eval.tasks.choices import ChoiceItem, read_choices

ITEM = ChoiceItem("law", "宪法，是什么？", ("法律", "a, b", "书", "花"), 1)
QUOTED = '宪法，是什么？,法律,"a, b",书,花'
HEADER = "id,question,A,B,C,D,answer\n"


def write(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8-sig" if name.startswith("val") else "utf8")
    return str(folder)


def row_of(path: Path, content: str) -> ChoiceItem:
    path.write_text(content, encoding="utf8")
    ((item,),) = read_choices(str(path), "test", []).values()
    return item


@pytest.mark.parametrize(
    ("files", "split"),
    [
        ({"val/law_val.csv": HEADER[:-1] + f",explanation\n0,{QUOTED},B,因为\n", "dev/law_dev.csv": "never,read\n",
          "test/law_test.csv": HEADER}, "val"),
        ({"test/law.csv": f",Question,A,B,C,D,Answer\n0,{QUOTED},B\n"}, "test"),
        ({"test/law_test.csv": f"{QUOTED},B\n"}, "test"),
        ({"law_test.csv": f"{QUOTED},B\n", "law_dev.csv": "Q,1,2,3,4,A\n"}, "test"),
    ],
    ids=["C-Eval", "CMMLU", "MMLU", "files beside each other"],
)  # fmt: skip
def test_folders_are_read_as_published(files, split, tmp_path):
    assert read_choices(write(tmp_path / "exam", files), split, []) == {"law": [ITEM]}
    # A file without a header may have lines in quotes.
    (tmp_path / "law.csv").write_text(f'{QUOTED},B\n"lines\nin quotes",1,2,3,4,d\n', encoding="utf8")
    found = read_choices(str(tmp_path / "law.csv"), "test", [])["law"]
    assert found == [ITEM, ChoiceItem("law", "lines\nin quotes", ("1", "2", "3", "4"), 3)]


def test_one_file_has_its_subjects_in_a_column(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"question": "Q", "choices": ["x", "y", "z"], "answer": 2, "subject": "art"},
        {"question": "R", "A": "x", "B": "y", "answer": "a"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    art, mine = ChoiceItem("art", "Q", ("x", "y", "z"), 2), ChoiceItem("mine", "R", ("x", "y"), 0)
    assert read_choices(str(path), "test", []) == {"art": [art], "mine": [mine]}
    assert read_choices(str(path), "test", ["art"]) == {"art": [art]}


@pytest.fixture
def hub(monkeypatch) -> list:
    """What is asked of a Hub that has the data set some/exam with two subjects."""
    import datasets

    asked: list = []

    def load(name: str, subset: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((name, subset, split, streaming))
        row = {"question": f"{subset}?", "choices": ["x", "y", "z", "w"], "answer": 3, "subject": ""}
        return datasets.IterableDataset.from_generator(lambda: iter([row]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["law", "art"])
    return asked


def test_the_hub_gives_a_subset_for_each_subject_or_is_named(hub, monkeypatch):
    found = read_choices("some/exam", "test", [])
    assert found == {s: [ChoiceItem(s, f"{s}?", ("x", "y", "z", "w"), 3)] for s in ("art", "law")}
    assert hub == [("some/exam", "art", "test", True), ("some/exam", "law", "test", True)]
    hub.clear()
    assert list(read_choices("some/exam:law", "val", [])) == ["law"]
    assert hub == [("some/exam", "law", "val", True)]

    def fail(name: str) -> None:
        raise ConnectionError("Couldn't reach it\nwith details")

    monkeypatch.setattr("datasets.get_dataset_config_names", fail)
    with pytest.raises(UserError, match=r"^some/exam: no such path here, and the Hub does not give it \(Couldn't"):
        read_choices("some/exam", "test", [])


def arc(*texts: str | None, labels: str, **answer: object) -> dict:
    """A row in ARC's layout."""
    return {"question": "Q", "choices": {"text": list(texts), "label": list(labels)}, **answer}


@pytest.mark.parametrize(
    ("row", "right"),
    [
        (arc("x", "y", "z", labels="ABC", answerKey="B"), "y"),
        (arc("x", "y", labels="BA", answer="B"), "x"),
        (arc("x", "y", "z", labels="123", answer=1), "x"),
        (arc("x", "y", "z", labels="123", answerKey="3"), "z"),
        (arc("x", "y", "z", labels="012", answer=1.0), "y"),
        (arc("x", None, "z", labels="ABC", answerKey="C"), "z"),
        (arc("x", "y", labels="AB", answer=1), "y"),
    ],
)
def test_the_labels_decide_which_choice_is_right(row, right, tmp_path):
    item = row_of(tmp_path / "a.jsonl", json.dumps(row))
    assert item.choices[item.answer] == right and item.choices == tuple(filter(None, row["choices"]["text"]))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"question": "Q", "A": "x", "B": "y", "C": null, "answer": "B"}', [("x", "y"), 1]),
        ('{"question": "Q", "A": "x", "B": "y", "C": NaN, "answer": "B"}', [("x", "y"), 1]),
        ('{"question": "Q", "choices": ["x", null, "z"], "answer": 2}', [("x", "z"), 1]),
        ('{"question": "Q", "choices": ["x", null, "z"], "answer": "C"}', [("x", "z"), 1]),
        ('{"question": "Q", "choices": ["x", "z"], "answer": 1.0}', [("x", "z"), 1]),
        ("question,A,B,C,answer\nQ,x,y,,B\n", [("x", "y"), 1]),
    ],
)
def test_a_null_is_not_a_choice(content, found, tmp_path):
    item = row_of(tmp_path / ("a.jsonl" if content.startswith("{") else "a.csv"), content)
    assert [item.choices, item.answer] == found


def test_a_snapshot_of_the_hub_has_its_subjects_in_folders_and_what_save_to_disk_wrote_its_splits(tmp_path):
    import datasets

    for name, question in (("law/test", "L"), ("law/dev", "no"), ("data/test", "D")):
        file = tmp_path / "exam" / f"{name}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([arc("x", "y", labels="AB", answerKey="A") | {"question": question}]), file)
    found = read_choices(str(tmp_path / "exam"), "test", [])
    asked = {subject: [item.question for item in items] for subject, items in found.items()}
    assert asked == {"exam": ["D"], "law": ["L"]}
    rows = {name: datasets.Dataset.from_list([arc("x", "y", labels="AB", answer=name)]) for name in ("A", "B")}
    datasets.DatasetDict(train=rows["A"], test=rows["B"]).save_to_disk(tmp_path / "saved")
    for folder, subject in (("saved", "saved"), ("saved/test", "test")):
        assert read_choices(str(tmp_path / folder), "test", []) == {subject: [ChoiceItem(subject, "Q", ("x", "y"), 1)]}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (HEADER + "0,Q,1,2,3,4,A\n1,Q,1,2,3,4,E\n", r":3: the answer is 'E', not one of A, B, C, D"),
        (HEADER + "0,Q,1,2,3,4,\n", r":2: the answer is '', not one of"),
        (HEADER + "0,Q,1,2,3,4,AB\n", r":2: the answer is 'AB'"),
        ("id,question,A,B,C,D\n0,Q,1,2,3,4\n", r":2: no column 'answer', the columns are 'id', 'question', 'A'.*split"),
        ("id,qestion,A,B,C,D,answer\n0,Q,1,2,3,4,A\n", r":2: no column 'question', the columns are 'id', 'qestion'"),
        ("question,A,answer\nQ,1,A\n", r":2: no column 'B'"),
        ("question,A,B,D,answer\nQ,1,2,4,A\n", r":2: choices A, B, D with one missing"),
        (HEADER + "0,,1,2,3,4,A\n", r":2: question is empty"),
        (HEADER + "0,Q,1,,3,4,A\n", r":2: B is empty"),
        (HEADER + "0,Q,1,2,3,,D\n", r":2: the answer is 'D', not one of A, B, C;"),
        (HEADER + "0,Q,1,2,3,4\n", r":2: 6 fields where the header has 7"),
        (HEADER + '0,"Q,1,2,3,4,A\n', r":2: a quote that is not closed"),
        ("Q,1,2,3,4,A\nQ,1\n", r":2: 2 fields where the header has 6"),
        ("", r": is empty"),
        (HEADER, r": is empty"),
        (f"Q,1,2,3,4,A\n{QUOTED},B\n".encode("gbk"), ":2: not UTF-8"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(content, what, tmp_path):
    (tmp_path / "val").mkdir()
    path = tmp_path / "val" / "law_val.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}{what}") as error:
        read_choices(str(tmp_path), "val", [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"choices": "xyz", "answer": 0}, "'choices' is not a list"),
        ({"choices": [{"text": "x"}, "y"], "answer": 0}, "'choices' is not a list of texts"),
        ({"choices": ["x", None, "z"], "answer": 1}, "the answer is 1, not one of A, C"),
        ({"choices": ["x", "y"], "answer": 0.5}, "the answer is 0.5, not one of A, B"),
        (arc("x", "y", labels="AB", answer=2), "the answer is 2, not one of A, B"),
        (arc("x", "y", labels="12", answer=0), "the answer is 0, not one of 1, 2"),
        (arc("x", "y", labels="A", answer="A"), "2 choices and not as many different labels"),
        (arc("x", "y", labels="AA", answer="A"), "2 choices and not as many different labels"),
        ({"choices": ["x", "y"], "answer": 2}, "the answer is 2, not one of A, B"),
        ({"choices": ["x", "y"], "answer": True}, "the answer is True"),
        ({"choices": ["a"], "answer": 0}, "1 choices, not 2 to 26"),
        ({"choices": [f"c{n}" for n in range(30)], "answer": 28}, "30 choices"),
        ([1], "not an object with question, choices and answer"),
    ],
)
def test_a_bad_json_row_is_named(row, what, tmp_path):
    row = {"question": "Q", **row} if isinstance(row, dict) else row
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}/a.jsonl:1: .*{what}"):
        row_of(tmp_path / "a.jsonl", json.dumps(row) + "\n")


@pytest.mark.parametrize(
    ("data", "split", "subjects", "what"),
    [
        ("exam", "validate", [], r"exam: no split 'validate', there are: test, validation; name"),
        ("exam", "dev", [], r"exam: no split 'dev', there are: test, validation; name one of them"),
        ("exam", "val", ["art"], "exam: no subject 'art' in split 'val'; it has nothing"),
        ("empty", "val", [], "empty: no val/ folder"),
        ("nowhere", "val", [], "nowhere: no such path"),
    ],
)
def test_a_folder_without_the_split_and_a_subject_that_is_not_there_are_named(data, split, subjects, what, tmp_path):
    write(tmp_path / "exam", {"val/law_val.csv": HEADER + f"0,{QUOTED},B\n", "test/law_test.csv": HEADER})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=what):
        read_choices(str(tmp_path / data) if data != "nowhere" else data, split, subjects)
