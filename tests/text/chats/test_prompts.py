"""Prompts out of any data: what follows the last question is left out, each is asked once."""

from __future__ import annotations

import pytest
from data_files import write

from errors import UserError
from text.chats.prompts import read_prompts, to_prompt
from text.sources.row_report import RowError, RowReport

QUESTION, REPLY = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def chat(*turns: str) -> list[dict[str, str]]:
    """User and assistant, alternating."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": chat("Q", "A")}, chat("Q")),
        ({"messages": chat("Q")}, chat("Q")),
        (chat("Q", "A", "Q2", "A2"), chat("Q", "A", "Q2")),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, chat("Q")),
        # OpenThoughts
        (
            {"system": "S", "conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]},
            [{"role": "system", "content": "S"}, *chat("Q")],
        ),
        ({"instruction": "Q", "input": "more", "output": "A"}, chat("Q\nmore")),
        ({"instruction": "Q", "output": "A", "history": [["q", "a"]]}, chat("q", "a", "Q")),
        ({"instruction": "Q"}, chat("Q")),
        ({"question": "Q", "input": "more"}, chat("Q")),  # which adds to an instruction alone
        ({"prompt": "Q", "input": "more"}, chat("Q")),
        ({"prompt": "Q"}, chat("Q")),
        ({"messages": chat("Q \ud83d", "A")}, chat("Q \ufffd")),
        ({"question": "Q", "answer": "an essay\nin lines"}, chat("Q")),
    ],
)
def test_every_layout_ends_with_its_last_question(row, messages):
    prompt = to_prompt(row)
    assert list(prompt.messages) == messages and prompt.problem is None


@pytest.mark.parametrize("row", [{"question": "1+1?", "answer": "2"}, {"prompt": "1+1?", "answer": "so #### 2"}])
def test_a_question_with_an_answer_can_be_verified(row):
    prompt = to_prompt(row)
    assert list(prompt.messages) == chat("1+1?") and prompt.problem.answer == "2"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (3, "not a prompt"),
        ({"text": "T"}, "unknown layout"),
        ({"messages": [REPLY]}, "no question"),
        ({"messages": [QUESTION, QUESTION]}, "no question"),
        ({"messages": "Q"}, "wrong type"),
        ({"messages": [{"role": "wizard", "content": "Q"}]}, "unknown role"),
        ({"messages": chat("Q\0")}, "NUL character"),
        ({"messages": chat(" ")}, "empty text"),
        ({"prompt": 7}, "wrong type"),
        ({"instruction": None}, "unknown layout"),
        ({"instruction": 7}, "wrong type"),
    ],
)
def test_rows_that_are_no_prompt_are_counted_by_kind(row, kind):
    with pytest.raises(RowError) as caught:
        to_prompt(row)
    assert caught.value.kind == kind


def test_prompts_come_once_with_their_system_prompt_and_bad_rows_are_named(tmp_path):
    own, report = {"messages": [{"role": "system", "content": "own"}, *chat("b")]}, RowReport()
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "a"}, {"text": "?"}, own, {"prompt": "c"}])
    found = list(read_prompts([path], "S", report=report))
    assert [[m["content"] for m in prompt.messages] for prompt in found] == [["S", "a"], ["own", "b"], ["S", "c"]]
    assert report.problems == {"unknown layout": 1, "question asked before": 1}
    assert report.rows == 5 and report.accepted == 3 and f"{path}:3" in report.examples["unknown layout"][0]
    with pytest.raises(UserError, match=r"p.jsonl:3: has 'text'"):
        list(read_prompts([path], on_error="stop"))
    assert len(list(read_prompts([path], most=1))) == 1
    with pytest.raises(UserError, match=r"no prompt to ask; 1 rows, all skipped: 1 x unknown layout"):
        list(read_prompts([write(tmp_path / "none.jsonl", [{"text": 1}])]))


def test_generators_are_asked_until_enough_different_problems_came():
    report = RowReport()
    found = list(read_prompts(["arithmetic:1"], most=150, seed=3, report=report))
    assert len({prompt.problem.question for prompt in found}) == len(found) == report.accepted == 150 < report.rows
    assert found == list(read_prompts(["arithmetic:1"], most=150, seed=3))
