"""Suites, their data and what was measured before, damaged: the same scores come of it, or one line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eval.score_files import read_scores, write_scores
from eval.suites.kinds import KINDS
from eval.suites.measuring import Measured, measure
from eval.suites.suite import open_suites
from fuzz.hostile import Thrower, thrown
from fuzz.mutations import PLACES, damaged, put, strange_json
from fuzz.test_fuzz_settings import strange_yaml

ROOT = Path(__file__).parents[2]
WEIGHTS = {"ckpt": "a", "dtype": "fp32", "files": []}


class Letters:
    """A model that reads characters and finds those likeliest that come early in the alphabet; see `OpenedModel`."""

    name, context, bos, eos, dtype = "letters", 200, 1, 2, "fp32"

    def __init__(self, chats: bool = True) -> None:
        self.chats = chats

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    encode_bare = encode

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return [number for message in messages for number in (3, *self.encode(message["content"]), self.eos)]

    def continuation_nats(self, items: Sequence[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
        return [[self._nats(context, choice) for choice in choices] for context, choices in items]

    def window_nats(self, windows: Sequence[tuple[list[int], int]]) -> list[float]:
        return [self._nats(ids[:first], ids[first:]) for ids, first in windows]

    def reply(self, prompts: Sequence[Any], max_new_tokens: int, temperature: float, seed: int) -> list[str]:
        said = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        return [text[:max_new_tokens] for text in said]

    def _nats(self, context: list[int], scored: list[int]) -> float:
        assert context and scored and len(context) + len(scored) <= self.context + 1
        return -sum(math.log(2 + number) for number in scored)


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
# What measures a layout, and its files: the suites of configs/eval where they serve.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, bytes]]] = {
    "ceval": ({"multiple_choice": {"split": "val", "shots": 2, "chat": True, "chunk": 2}}, {
        "val/law_val.csv": as_csv([["id", "question", "A", "B", "C", "D", "answer"], *HEADED]),
        "dev/law_dev.csv": as_csv([["id", "question", "A", "B", "C", "D", "answer", "explanation"],
                                   *([*row, "因为"] for row in HEADED)]),
    }),
    "cmmlu": ({"multiple_choice": {"split": "test", "form": "text", "cue": "", "chunk": 2}}, {
        "test/agronomy.csv": as_csv([["", "Question", "A", "B", "C", "D", "Answer"], *HEADED]),
        "test/law.csv": as_csv([["", "Question", "A", "B", "C", "D", "Answer"], *HEADED]),
    }),
    "mmlu": ({"multiple_choice": {"split": "test", "intro": "About {subject}.\n\n", "chunk": 2}},
             {"test/anatomy_test.csv": as_csv([row[1:] for row in HEADED])}),
    "arc": ({"multiple_choice": {"chunk": 2}}, {"arc.jsonl": as_lines(
        [{"question": text, "choices": {"text": CHOICES, "label": list("ABCD")}, "answer": 1, "subject": "s"}
         for text in ASKED])}),
    "gsm8k": ({"exact_match": {"max_new_tokens": 40, "chunk": 2}}, {"test.jsonl": PROBLEMS}),
    "sampled": ({"exact_match": {"samples": 2, "temperature": 1.0, "k": [1, 2], "shots": 1, "max_new_tokens": 9,
                                 "chunk": 2}}, {"test.jsonl": PROBLEMS, "train.jsonl": PROBLEMS}),
    "text": ({"text": {"window": 16, "stride": 8, "chunk": 2}}, {"a.jsonl": as_lines([{"text": t} for t in ASKED])}),
    "plain": ({"text": {"window": 16, "stride": 8}}, {"a.txt": "\n".join(ASKED).encode()}),
    "questions": ({"questions": {"max_new_tokens": 5, "chunk": 2}}, {"q.jsonl": REPLIES}),
    "style": ({"style": {"max_new_tokens": 5, "chunk": 2}}, {"q.jsonl": REPLIES}),
    "quality": ({"quality": {"max_new_tokens": 20, "chunk": 2}}, {"p.jsonl": REPLIES}),
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


def measured(suite: Path, out: Path, chats: bool = True) -> list[Measured]:
    """As eval/run.py, but for opening the checkpoint and the terminal's table; a page, and no picture."""
    found = []
    for name, one in open_suites(str(suite), KINDS).items():
        items = one.items(0)
        assert items
        found.append(measure(name, one, items, Letters(chats), WEIGHTS, out))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.score_files.draw", lambda *_: None)  # a tenth of a second
        write_scores(out, "model", WEIGHTS, found)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("chats", [True, False])
def test_whole_ones_are_measured(throw: Thrower, name: str, chats: bool, tmp_path: Path) -> None:
    done = throw(measured, laid_out(tmp_path, name), tmp_path / "out", chats)
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
        throw(measured, suite, folder / "out", data.draw(st.booleans()))


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
    throw(open_suites, ",".join(names), KINDS)


@pytest.mark.parametrize("name", ["ceval", "gsm8k", "text", "questions"])
@thrown(0.15)
@given(data=st.data())
def test_rows_of_an_earlier_measurement(throw: Thrower, place: Path, name: str, data: st.DataObject) -> None:
    """Whatever became of them: the scores are those of a measurement that begins anew."""
    with emptied(place) as folder:
        suite = laid_out(folder, name)
        whole = measured(suite, folder / "out")[0]
        file = folder / "out" / f"{name}.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        if data.draw(st.booleans()):
            number = data.draw(st.integers(0, len(lines) - 1))
            lines[number] = data.draw(strange_json(lines[number])) + b"\n"
            content = b"".join(lines)
        else:
            content = data.draw(damaged(b"".join(lines)))
        put(file, content, data.draw(st.sampled_from(PLACES)))
        done = throw(measured, suite, folder / "out")
    if done.value is not None:
        assert done.value[0].scores == whole.scores


@thrown(0.5)
@given(data=st.data())
def test_scores_of_an_earlier_measurement(throw: Thrower, place: Path, data: st.DataObject) -> None:
    with emptied(place) as folder:
        suite = laid_out(folder, "questions")
        measured(suite, folder / "out")
        file = folder / "out" / "scores.json"
        content = re.sub(rb'"seconds": [\d.e-]+', b'"seconds": 0.5', file.read_bytes())  # else no two are alike
        put(file, data.draw(strange_json(content)), data.draw(st.sampled_from(PLACES)))
        throw(read_scores, folder / "out")
        throw(measured, suite, folder / "out")
