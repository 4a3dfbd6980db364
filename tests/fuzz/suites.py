"""Tasks of an evaluation, their data, and what measures them without a model."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_files import file_bytes

from eval.score_files import read_scores, write_scores
from eval.scores import Item, Measured, Score, score_items
from eval.tasks.opened import open_tasks
from eval.tasks.problems import judge
from eval.tasks.replies import as_text, describe, first_answer, judge_answer, judge_style


def as_csv(rows: list[list[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


SCORES = [Score("all", "acc", 0.5, 0.4, 0.6, 0.25, 10), Score("all", "bits_per_byte", 2.0, items=10, share=False)]
WORDS = Measured("words", {"kind": "text", "window": 2}, SCORES, 10, 0, 1.0, "ab")
SCORED = json.dumps({"ckpt": "a", "weights": {}, "suites": {"words": asdict(WORDS)}}).encode()
CHOICES = ["春天", "夏天, 也许", "autumn", "winter"]
ASKED = [f"第{number}题：现在是什么季节？" for number in range(5)]
HEADED = [[str(number), text, *CHOICES, "ABCD"[number % 4]] for number, text in enumerate(ASKED)]
SUMS = [{"question": f"{n} + 1?", "answer": f"It is {n} + 1 = {n + 1}.\n#### {n + 1}"} for n in range(5)]
SAID = [{"question": f"{n}?", "answer": f"{n}", "kind": "$n$", "opening": "a", "closing": "b"} for n in range(5)]
PROBLEMS, REPLIES = file_bytes("a.jsonl", SUMS), file_bytes("a.jsonl", SAID)
# What measures a layout, and its files.
SUITES: dict[str, tuple[dict[str, Any], dict[str, bytes]]] = {
    "ceval": ({"multiple_choice": {"data": ".", "split": "val", "shots": 2, "chat": True}}, {
        "val/law_val.csv": as_csv([["id", "question", "A", "B", "C", "D", "answer"], *HEADED]),
        "dev/law_dev.csv": as_csv([["id", "question", "A", "B", "C", "D", "answer", "explanation"],
                                   *([*row, "因为"] for row in HEADED)]),
    }),
    "cmmlu": ({"multiple_choice": {"data": ".", "split": "test", "form": "text", "cue": ""}}, {
        f"test/{name}.csv": as_csv([["", "Question", "A", "B", "C", "D", "Answer"], *HEADED]) for name in ("law", "art")
    }),
    "mmlu": ({"multiple_choice": {"data": ".", "split": "test", "intro": "About {subject}.\n\n"}},
             {"test/anatomy_test.csv": as_csv([row[1:] for row in HEADED])}),
    "arc": ({"multiple_choice": {"data": "a.jsonl"}}, {"a.jsonl": file_bytes("a.jsonl", 
        [{"question": text, "choices": {"text": CHOICES, "label": list("ABCD")}, "answer": 1, "subject": "s"}
         for text in ASKED])}),
    "gsm8k": ({"exact_match": {"data": "test.jsonl", "max_new_tokens": 40}}, {"test.jsonl": PROBLEMS}),
    "sampled": ({"exact_match": {"data": "test.jsonl", "shots_data": "train.jsonl", "samples": 2, "temperature": 1.0,
                                 "k": [1, 2], "shots": 1, "max_new_tokens": 9}},
                {"test.jsonl": PROBLEMS, "train.jsonl": PROBLEMS}),
    "text": ({"text": {"data": "a.jsonl", "window": 16, "stride": 8}},
             {"a.jsonl": file_bytes("a.jsonl", [{"text": t} for t in ASKED])}),
    "plain": ({"text": {"data": "a.txt", "window": 16, "stride": 8}}, {"a.txt": "\n".join(ASKED).encode()}),
    "questions": ({"questions": {"data": "q.jsonl", "max_new_tokens": 5}}, {"q.jsonl": REPLIES}),
    "style": ({"style": {"data": "q.jsonl", "max_new_tokens": 5}}, {"q.jsonl": REPLIES}),
    "quality": ({"quality": {"data": "p.jsonl", "max_new_tokens": 20}}, {"p.jsonl": REPLIES}),
}  # fmt: skip


def suite(name: str) -> dict[str, bytes]:
    """The files of a suite, and what an earlier measurement left."""
    content, files = SUITES[name]
    return {**files, "suite.yaml": yaml.safe_dump(content).encode(), "out/scores.json": SCORED}


JUDGES = {"exact_match": judge, "questions": judge_answer, "style": judge_style, "quality": describe}


def measured(folder: Path, tools: Any = None) -> list[Measured]:
    """As eval/run.py, but for lm-evaluation-harness and the model: the likeliest choice is the shortest, and the reply
    to a question its own beginning; a page, and no picture."""
    if (folder / "out").exists():
        read_scores(folder / "out")
    found = []
    for task in open_tasks(str(folder / "suite.yaml"), theirs_first=False):
        docs = task.settings.docs()
        assert docs
        samples = task.settings.keys().get("repeats", 1)
        items = [Item(doc["group"], values_of(task.kind, doc, samples), chance(doc)) for doc in docs]
        scores = score_items(items, {}, bootstrap=task.kind == "quality")
        assert items and scores
        found.append(Measured(task.name, vars(task.settings), scores, len(items), 0, 1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.score_files.draw", lambda *_: None)  # a tenth of a second
        write_scores(folder / "out", "model", {"ckpt": "a", "dtype": "fp32", "files": []}, found)
    return found


def values_of(kind: str, doc: dict[str, Any], samples: int) -> dict[str, Any]:
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
