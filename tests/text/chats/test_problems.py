"""Problems: the layouts people have, generators with levels, what is held out, and rows that cannot be used."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import pytest
from data_files import write

from dataset import PromptDataset
from errors import UserError
from text.chats.arithmetic import arithmetic_problem
from text.chats.problems import Problems, open_problems, read_problems, to_problem
from text.sources.row_report import RowError, RowReport
from training.alignment.rewards import is_correct

GSM8K = {"question": "How many clips?", "answer": "Natalia sold 48/2 = <<48/2=24>>24.\n48+24 = 72\n#### 1,072"}
CHINESE = {"question": "How many?", "question_zh-cn": "一共卖出多少个？", "answer": "...", "answer_only": "72"}


@pytest.mark.parametrize(
    ("row", "question", "answer", "language"),
    [
        (GSM8K, "How many clips?", "1,072", "en"),
        (CHINESE, "一共卖出多少个？", "72", "zh"),
        ({"question": " Capital of France? ", "answer": "Paris"}, "Capital of France?", "Paris", "en"),
        ({"problem": "Half?", "answer": r"\frac{1}{2}", "kind": "hard"}, "Half?", r"\frac{1}{2}", "en"),
        ({"prompt": "2+2", "answer": 4}, "2+2", "4", "en"),
        ({"question": "2+2 \ud83d?", "answer": "4", "kind": "sums"}, "2+2 \ufffd?", "4", "en"),
        ({"question": None, "question_zh-cn": "几个？", "answer_only": 0.5}, "几个？", "0.5", "zh"),
    ],
)
def test_layouts(row, question, answer, language):
    problem = to_problem(row)
    assert (problem.question, problem.answer, problem.language) == (question, answer, language)
    assert problem.kind == row.get("kind", "all")


@pytest.mark.parametrize(
    ("row", "kind", "what"),
    [
        ({"question": "Q"}, "no answer", "has 'question', but not"),
        ({"question": "Q", "answer": None}, "no answer", "with something in both"),
        ({"question": "Q", "answer": " "}, "no answer", "is empty"),
        ({"question": "Q", "answer": "text\n#### about ten"}, "unparsable answer", "'about ten', not one number"),
        ({"question": "Q", "answer": "?!"}, "unparsable answer", "no letter or digit"),
        ({"question": "Q", "answer": "First we add.\nThen we multiply."}, "unparsable answer", "in 2 lines"),
        ({"question": "", "answer": "1"}, "empty question", "is empty"),
        ({"question": ["Q"], "answer": "1"}, "wrong type", "'question' is a list"),
        ({"question": "Q", "answer": True}, "wrong type", "'answer' is a boolean"),
        ({"text": "Q"}, "unknown layout", "has 'text'"),
        (["Q", "A"], "not a problem", "the row is a list"),
    ],
)
def test_rows_that_cannot_be_used_are_named(row, kind, what):
    with pytest.raises(RowError, match=what) as raised:
        to_problem(row)
    assert raised.value.kind == kind


def test_bad_rows_are_counted_with_their_places_or_stop_the_reading(tmp_path):
    rows = [GSM8K, {"question": "Q"}, {"question": "R", "answer": "1"}, GSM8K, {"question": "S", "answer": "\n####"}]
    path, report = write(tmp_path / "p.jsonl", rows), RowReport()
    assert len(read_problems(path, report=report)[0]) == 2 and (report.rows, report.accepted) == (5, 2)
    assert dict(report.problems) == {"no answer": 1, "question asked before": 1, "unparsable answer": 1}
    assert report.examples["no answer"][0].startswith(f"{path}:2: ")
    with pytest.raises(UserError, match=r"p.jsonl:2: .*fix or drop the row or pass --on_error skip"):
        read_problems(path, on_error="stop")
    with pytest.raises(UserError, match=r"no problem to train on; .*has 'question'"):
        open_problems(write(tmp_path / "empty.jsonl", [{"question": "Q"}]))


def test_a_file_is_shown_once_an_epoch_and_never_what_is_held_out(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"question": f"Q{i}", "answer": str(i)} for i in range(50)])
    problems = Problems.listed(*read_problems(path, val_fraction=0.2))
    held = {problem.question for problem in problems.held_out(100)}
    epochs = [
        [problems.problem(len(problems) * epoch + i, 3).question for i in range(len(problems))] for epoch in (0, 1)
    ]
    assert 3 <= len(held) <= 20 and len(problems) + len(held) == 50
    assert set(epochs[0]) == set(epochs[1]) == {f"Q{i}" for i in range(50)} - held
    assert epochs[0] != epochs[1] and len(set(epochs[0])) == len(epochs[0])
    write(tmp_path / "p.jsonl", [{"question": f"Q{i}", "answer": "1"} for i in range(90)])
    assert held < {problem.question for problem in read_problems(path, val_fraction=0.2)[1]}


def test_arithmetic_alternates_its_levels_and_measures_on_held_out_sums():
    problems = open_problems("arithmetic:2-3")
    drawn = [problems.problem(i, 5) for i in range(200)]
    assert [problem.kind for problem in drawn[:4]] == ["level 2", "level 3", "level 2", "level 3"]
    assert drawn[7] == problems.problem(7, 5) != problems.problem(7, 6)
    held = problems.held_out(64)
    assert held == open_problems("arithmetic:2-3").held_out(64)
    assert not {problem.question for problem in drawn} & {problem.question for problem in held}
    question, answer = arithmetic_problem(random.Random("held out/0"), 2, held_out=True)
    assert held[0].question == question and is_correct(held[0], answer)
    for name in ("arithmetic:0", "arithmetic:1-5", "arithmetic:3-1", "arithmetic:x"):
        with pytest.raises(UserError, match="levels 1 to 4"):
            open_problems(name)


def test_reasoning_gym_judges_its_own_tasks(monkeypatch):
    class Task:
        def __init__(self, seed: int) -> None:
            self.seed = seed

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> dict:
            return {"question": f"Name a multiple of {index + 2}. {self.seed}", "answer": index + 2}

        def score_answer(self, answer: str, entry: dict) -> float:
            return float(int(answer) % entry["answer"] == 0)

    def create_dataset(task: str, size: int, seed: int) -> Task:
        if task != "multiples":
            raise ValueError("no such task")
        return Task(seed)

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset))
    problem = open_problems("reasoning_gym:multiples").problem(5, 0)
    assert problem.question == "Name a multiple of 7. 0"
    assert is_correct(problem, "<answer>14</answer>") and not is_correct(problem, "<answer>15</answer>")
    with pytest.raises(UserError, match="no such task"):
        open_problems("reasoning_gym:multipels")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        open_problems("reasoning_gym:multiples")


def test_prompts_end_where_the_answer_begins_and_a_system_prompt_comes_first(tokenizer):
    prompts = PromptDataset([("arithmetic:1", 1.0)], tokenizer, 64, system="请思考。")
    problem = prompts.problem(0)
    (ids,) = prompts.encode([problem])
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        f"<s><|system|>请思考。<|user|>{problem.question}<|assistant|>"
    )


def test_sources_are_mixed_by_weight_and_another_turn_draws_others(tokenizer, tmp_path):
    path = write(tmp_path / "p.jsonl", [{"question": f"Q{i}", "answer": str(i), "kind": "file"} for i in range(50)])
    prompts = PromptDataset([(path, 3.0), ("arithmetic:1", 1.0)], tokenizer, 64, seed=1, val_problems=8)
    kinds = [prompts.problem(i).kind for i in range(4096)]
    assert kinds.count("file") == 3072 and kinds.count("level 1") == 1024
    assert [prompts.problem(i) for i in range(9)] == [prompts.problem(i) for i in range(9)]
    assert [prompts.problem(i, 1) for i in range(9)] != [prompts.problem(i) for i in range(9)]
    assert len(prompts) == 10_050 and len(prompts.validation) == 4  # of the file nothing was held out


def test_prompts_that_are_too_long_are_left_out_and_counted(tokenizer, tmp_path, capsys):
    rows = [{"question": "Q", "answer": "1"}, {"question": "long " * 50, "answer": "2"}, {"question": "R"}]
    prompts = PromptDataset([(write(tmp_path / "p.jsonl", rows), 1.0)], tokenizer, 20)
    prompts.print_summary()
    shown = capsys.readouterr().out
    assert len(prompts) == 1 and "2 of 3 rows read, 1 skipped" in shown
    assert "1 left out: longer than 20 tokens, which --sequence_length leaves beside a reply; raise it" in shown
    with pytest.raises(UserError, match="all prompts have more than 3 tokens"):
        PromptDataset([(str(tmp_path / "p.jsonl"), 1.0)], tokenizer, 3)
