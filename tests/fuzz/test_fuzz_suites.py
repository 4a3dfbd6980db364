"""Tasks, their data and what was measured before, damaged: scores come of it, or one line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eval.score_files import read_scores, write_scores
from eval.scores import Item, Measured, score_items
from eval.tasks.opened import open_tasks
from eval.tasks.problems import judge
from eval.tasks.replies import as_text, describe, first_answer, judge_answer, judge_style
from fuzz.hostile import Thrower, thrown
from fuzz.mutations import PLACES, damaged, put, strange_json
from fuzz.test_fuzz_settings import strange_yaml

ROOT = Path(__file__).parents[2]
WEIGHTS = {"ckpt": "a", "dtype": "fp32", "files": []}


JUDGES = {"exact_match": judge, "questions": judge_answer, "style": judge_style, "quality": describe}


def as_csv(rows: list[list[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


CHOICES = ["春天", "夏天, 也许", "autumn", "winter"]
ASKED = [f"第{number}题：现在是什么季节？" for number in range(5)]
HEADED = [[str(number), text, *CHOICES, "ABCD"[number % 4]] for number, text in enumerate(ASKED)]
PROBLEMS = as_lines([{"question": f"{n} + 1?", "answer": f"It is {n} + 1 = {n + 1}.\n#### {n + 1}"} for n in range(5)])
REPLIES = as_lines([{"question": f"{n}?", "answer": f"{n}", "kind": "$n$", "opening": "a", "closing": "b"}
                    for n in range(5)])  # fmt: skip
# What measures a layout, and its files.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, bytes]]] = {
    "ceval": ({"multiple_choice": {"split": "val", "shots": 2, "chat": True}}, {
        "val/law_val.csv": as_csv([["id", "question", "A", "B", "C", "D", "answer"], *HEADED]),
        "dev/law_dev.csv": as_csv([["id", "question", "A", "B", "C", "D", "answer", "explanation"],
                                   *([*row, "因为"] for row in HEADED)]),
    }),
    "cmmlu": ({"multiple_choice": {"split": "test", "form": "text", "cue": ""}}, {
        "test/agronomy.csv": as_csv([["", "Question", "A", "B", "C", "D", "Answer"], *HEADED]),
        "test/law.csv": as_csv([["", "Question", "A", "B", "C", "D", "Answer"], *HEADED]),
    }),
    "mmlu": ({"multiple_choice": {"split": "test", "intro": "About {subject}.\n\n"}},
             {"test/anatomy_test.csv": as_csv([row[1:] for row in HEADED])}),
    "arc": ({"multiple_choice": {}}, {"arc.jsonl": as_lines(
        [{"question": text, "choices": {"text": CHOICES, "label": list("ABCD")}, "answer": 1, "subject": "s"}
         for text in ASKED])}),
    "gsm8k": ({"exact_match": {"max_new_tokens": 40}}, {"test.jsonl": PROBLEMS}),
    "sampled": ({"exact_match": {"samples": 2, "temperature": 1.0, "k": [1, 2], "shots": 1, "max_new_tokens": 9,
                                 }}, {"test.jsonl": PROBLEMS, "train.jsonl": PROBLEMS}),
    "text": ({"text": {"window": 16, "stride": 8}}, {"a.jsonl": as_lines([{"text": t} for t in ASKED])}),
    "plain": ({"text": {"window": 16, "stride": 8}}, {"a.txt": "\n".join(ASKED).encode()}),
    "questions": ({"questions": {"max_new_tokens": 5}}, {"q.jsonl": REPLIES}),
    "style": ({"style": {"max_new_tokens": 5}}, {"q.jsonl": REPLIES}),
    "quality": ({"quality": {"max_new_tokens": 20}}, {"p.jsonl": REPLIES}),
}  # fmt: skip


def laid_out(folder: Path, name: str) -> Path:
    """The files of a layout in a folder, and a suite of it. Returns the suite's file."""
    content, files = LAYOUTS[name]
    for each, data in files.items():
        (folder / each).parent.mkdir(parents=True, exist_ok=True)
        (folder / each).write_bytes(data)
    ((kind, settings),) = content.items()
    first = next(iter(files))
    place = {"data": str(folder if "/" in first else folder / first)}
    if "train.jsonl" in files:
        place["shots_data"] = str(folder / "train.jsonl")
    suite = folder / f"{name}.yaml"
    suite.write_text(yaml.safe_dump({kind: {**settings, **place}}), encoding="utf8")
    return suite


def measured(suite: Path, out: Path) -> list[Measured]:
    """As eval/run.py, but for lm-evaluation-harness and the model: the likeliest choice is the shortest, and the reply
    to a question its own beginning; a page, and no picture."""
    found = []
    for task in open_tasks(str(suite), theirs_first=False):
        docs = task.settings.docs()
        assert docs
        samples = task.settings.keys().get("repeats", 1)
        items = [Item(doc["group"], values(task.kind, doc, samples), chance(doc)) for doc in docs]
        scores = score_items(items, {}, bootstrap=task.kind == "quality")
        found.append(Measured(task.name, vars(task.settings), scores, len(items), 0, 1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.score_files.draw", lambda *_: None)  # a tenth of a second
        write_scores(out, "model", WEIGHTS, found)
    return found


def values(kind: str, doc: dict[str, Any], samples: int) -> dict[str, Any]:
    if kind == "multiple_choice":
        assert doc["prompt"] and len(doc["choices"]) > doc["answer"]
        shortest = min(range(len(doc["choices"])), key=lambda place: len(doc["choices"][place]))
        return {"acc": float(shortest == doc["answer"])}
    if kind == "text":
        size = len(doc["text"].encode())
        return {"bits_per_byte": (-2.0 * size, size)}
    assert as_text(doc["turns"])
    return JUDGES[kind](doc, [[first_answer(doc["question"])] * samples])


def chance(doc: dict[str, Any]) -> float | None:
    return 1 / len(doc["choices"]) if "choices" in doc else None


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_ones_are_measured(throw: Thrower, name: str, tmp_path: Path) -> None:
    done = throw(measured, laid_out(tmp_path, name), tmp_path / "out")
    assert done.code == 0 and done.value[0].items >= 1 and done.value[0].scores


@pytest.mark.parametrize("name", LAYOUTS)
@thrown(0.25)
@given(data=st.data())
def test_the_data_of_a_suite(throw: Thrower, name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        suite, files = laid_out(folder, name), LAYOUTS[name][1]
        chosen = data.draw(st.sampled_from(sorted(files)))
        content = files[chosen]
        if chosen.endswith(".jsonl") and data.draw(st.booleans()):
            lines = content.splitlines()
            lines[0] = data.draw(strange_json(lines[0]))
            content = b"\n".join(lines)
        else:
            content = data.draw(damaged(content))
        put(folder / chosen, content, data.draw(st.sampled_from(PLACES)))
        throw(measured, suite, folder / "out")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a case lies whose draws depend on its path, which must be the same each time."""
    return tmp_path_factory.mktemp("suites") / "case"


@contextlib.contextmanager
def emptied(place: Path) -> Iterator[Path]:
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place)


@thrown(0.5)
@given(data=st.data())
def test_the_file_of_a_suite(throw: Thrower, place: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(LAYOUTS)))
    with emptied(place) as folder:
        suite = laid_out(folder, name)
        content = data.draw(strange_yaml(suite.read_bytes()))
        put(suite, content, data.draw(st.sampled_from(PLACES)))
        throw(measured, suite, folder / "out")


@thrown(0.5)
@given(names=st.lists(st.sampled_from(("ceval", "no-such", "a.yaml", "", "=", "../x", "text=", "text=a,b")), max_size=3)
       | st.lists(st.text(max_size=8), max_size=2))  # fmt: skip
def test_what_suite_names(throw: Thrower, names: list[str]) -> None:
    throw(open_tasks, ",".join(names), False)


@thrown(0.5)
@given(data=st.data())
def test_scores_of_an_earlier_measurement(throw: Thrower, place: Path, data: st.DataObject) -> None:
    with emptied(place) as folder:
        suite = laid_out(folder, "questions")
        measured(suite, folder / "out")
        file = folder / "out" / "scores.json"
        put(file, data.draw(strange_json(file.read_bytes())), data.draw(st.sampled_from(PLACES)))
        throw(read_scores, folder / "out")
        throw(measured, suite, folder / "out")
