"""Worked sums of the R1 path and greeting messages of the adapter: right, well-formed, and nothing held out in them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from text.chats.arithmetic import arithmetic_problem
from text.chats.conversations import read_conversations
from text.chats.problems import Problem, open_problems, to_problem
from text.judging.answers import conclusion
from training.alignment.rewards import Sample, find
from world import greeting_messages
from world.columns import explained, worked
from world.numbers import states_held_out
from world.reasoning import generate


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("r1")
    generate(folder, few=20, many=300)
    return folder


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]


@pytest.mark.parametrize("name", ["format.jsonl", "cold_start.jsonl"])
def test_worked_sums_are_right_well_formed_and_in_one_language(name, files):
    for conversation in read_conversations(files / name):
        question, reply = (message["content"] for message in conversation)
        numbers = re.search(r"<answer>\n(\d+)\n</answer>", reply)
        sample = [Sample(Problem(question, numbers[1], "all"), reply, 9, 99)]
        assert find("strict_format")(sample) == find("correct")(sample) == find("language")(sample) == [1]


def test_thoughts_calculate_step_by_step():
    assert worked("算一算，24加35等于几？").split("\n") == ["个位4加5等于9。", "十位2加3等于5。", "24加35等于59。"]
    assert worked("What is 9 times 8?") == "9 times 8 is 72."
    assert worked("请计算：20-3+4=？").split("\n") == ["20减3等于17。", "17加4等于21。"]
    for level in (1, 2, 3, 4):
        rng = random.Random(level)
        for _ in range(100):
            question, answer = arithmetic_problem(rng, level)
            assert re.findall(r"\d+", worked(question))[-1] == re.findall(r"\d+", answer)[-1]


def test_explanations_show_the_columns_and_end_in_the_right_number():
    assert explained("算一算，6加51等于几？") == "个位6加1等于7，所以6加51等于57。"
    assert explained("What is 58 minus 51?") == "Ones: 8 minus 1 is 7, tens: 5 minus 5 is 0, so 58 minus 51 is 7."
    assert explained("请计算：17+25=？") is None and explained("请计算：2+3=？") is None  # a carry; nothing to show
    rng = random.Random(0)
    for _ in range(200):
        question, answer = arithmetic_problem(rng, 2)
        assert conclusion(explained(question)) == conclusion(answer) == answer


def test_problems_of_other_kinds_have_their_answer_and_nothing_held_out(files):
    problems = open_problems(str(files / "problems.jsonl"))
    kinds = {to_problem(row).kind for row in rows(files / "problems.jsonl")}
    assert kinds == {"comparison", "sequence", "counting"} and len(problems) > 200
    for row in rows(files / "problems.jsonl"):
        assert not states_held_out(f"{row['question']} {row['answer']}")


def test_held_out_messages_are_new_and_in_a_style_of_their_own(tmp_path):
    greeting_messages.generate(tmp_path)
    train, held_out = json.loads((tmp_path / "train.json").read_text("utf8")), rows(tmp_path / "heldout.jsonl")
    taught = {row["output"] for row in train}
    assert len(held_out) > 100 and not taught & {row["answer"] for row in held_out}
    assert len({(row["opening"], row["closing"]) for row in held_out}) == len(greeting_messages.STYLES)
    for row in held_out:
        assert row["answer"].startswith(row["opening"]) and row["answer"].endswith(row["closing"])
        assert any(row["opening"] in text for text in taught)  # each part of what is asked, with other parts
    asked = [json.dumps([row["instruction"], row["input"]]) for row in train]
    assert len(asked) == len(set(asked))
