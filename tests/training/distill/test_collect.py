"""The R1 path's own tools: worked sums, rejection sampling, and the table."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

import collect
from cli import call
from dataset import PromptDataset
from eval.reasoning import reasoning
from text.chats.arithmetic import arithmetic_problem
from text.chats.conversations import read_conversations
from text.chats.problems import Problem, open_problems, to_problem
from training.alignment.rewards import Rewards, Sample, find
from world.columns import conclusion, explained, worked
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


def test_the_shortest_different_right_answers_are_kept():
    problem, told = Problem("?", "7", "sums"), collect.Statistics()
    texts = ["it is 7", "7", "7", "8", "so 7", "7 but cut"]
    for nothing in (" \n", "7\0"):
        sample = [Sample(problem, nothing, 1, 9)]
        assert collect.verified(sample, Rewards.of({"overlong": 1.0}), -1, 2, collect.Statistics()) == []
    samples = [Sample(problem, text, 4, 9, ended=text != "7 but cut") for text in texts]
    kept = collect.verified(samples, Rewards.of({"correct": 1.0}), 1.0, 2, told)
    assert kept == ["7", "so 7"]
    assert (told.samples, told.right, told.repeated, told.kept, told.solved) == (6, 4, 1, 2, 1)


def test_what_is_collected_can_be_fine_tuned_on(files, pretrained, tmp_path, run):
    arguments = ["--ckpt", pretrained / "final", "--data", "arithmetic:1", "--out", tmp_path / "kept.jsonl"]
    arguments += ["--prompts", 8, "--samples", 4, "--max_new_tokens", 6, "--dtype", "fp32"]
    arguments += ["--rewards", '{"overlong": 1}']
    done = run(collect.main, *arguments, "--at_least", -1, "--mix", files / "cold_start.jsonl", "--mix_share", 0.5)
    assert done.code == 0, done.err
    written = list(read_conversations(tmp_path / "kept.jsonl"))
    kept = int(re.search(r"(\d+) kept", done.out)[1])
    assert "8 prompts, 32 samples" in done.out and f"{kept} chats mixed in" in done.out and len(written) == 2 * kept > 0
    again = run(collect.main, *arguments, "--at_least", 2)
    assert again.code == 2 and "none of 32 answers is worth 2; lower --at_least" in again.err


def test_a_small_file_is_asked_once(pretrained, tmp_path, run, monkeypatch):
    questions = [f"What is {number} plus 1?" for number in range(5)]
    problems = [json.dumps({"question": question, "answer": "9"}) for question in questions]
    (tmp_path / "few.jsonl").write_text("\n".join(problems), encoding="utf8")
    monkeypatch.setattr(collect, "judged_samples", lambda problem, *_: [Sample(problem, "9", 1, 9)] * 2)
    arguments = ["--ckpt", pretrained / "final", "--data", tmp_path / "few.jsonl", "--out", tmp_path / "kept.jsonl"]
    done = run(collect.main, *arguments, "--prompts", 12, "--samples", 2, "--max_new_tokens", 4, "--dtype", "fp32")
    assert done.code == 0, done.err
    assert "no more than 5 different problems" in done.out and "5 prompts, 10 samples" in done.out
    assert sorted(chat[0]["content"] for chat in read_conversations(tmp_path / "kept.jsonl")) == questions


def test_generated_problems_that_come_again_are_not_asked_again(tokenizer):
    asked = PromptDataset(["arithmetic:1"], tokenizer, 64)
    found = collect.distinct(asked, 150)
    assert len({problem.question for problem in found.values()}) == len(found) == 150 < max(found)


def test_the_table_shows_each_checkpoint(pretrained, tmp_path, run):
    both = f"{pretrained}/final,{pretrained}/final"
    options = ["--ckpt", both, "--data", "arithmetic:1-2", "--problems", 6, "--max_new_tokens", 6, "--dtype", "fp32"]
    done = run(lambda: call(reasoning, ""), *options, "--json", tmp_path / "table.json")
    assert done.code == 0, done.err
    one, two = json.loads((tmp_path / "table.json").read_text(encoding="utf8"))
    assert one == two and 0 <= one["correct"] <= 1 and 1 <= one["tokens"] <= 6
