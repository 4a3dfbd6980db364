"""The R1 path's own tools: worked sums, rejection sampling, and the table."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

import collect
import distill
from cli import call
from eval.reasoning import reasoning
from text.chats.arithmetic import arithmetic_problem
from text.chats.conversations import read_conversations
from text.chats.problems import Problem, open_problems, to_problem
from text.chats.prompts import read_prompts
from text.judging.answers import conclusion
from text.sources.row_report import RowReport
from training.alignment.rewards import Sample, find
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


def collecting(pretrained: Path, data: object, *more: object) -> list[object]:
    given = ["--method", "answers", "--teacher", pretrained / "final", "--data", data, "--max_new_tokens", 6]
    return [*given, "--dtype", "fp32", "--rewards", '{"overlong": 1}', *more]


def test_what_is_collected_goes_into_a_file_with_other_conversations(files, pretrained, tmp_path, run):
    out, few = tmp_path / "kept.jsonl", ["--prompts", 8, "--samples", 8]
    mixed = [*few, "--out", out, "--mix", files / "cold_start.jsonl", "--mix_share", 0.5]
    done = run(distill.main, *collecting(pretrained, "arithmetic:1", *mixed, "--at_least", -1))
    assert done.code == 0, done.err
    written, answered = list(read_conversations(out)), {chat[0]["content"] for chat in read_conversations(out)}
    kept = int(re.search(r"(\d+) kept", done.out)[1])
    assert "64 answers to 8 prompts" in done.out and f"{kept} mixed in" in done.out and len(written) == 2 * kept > 0
    others = {chat[0]["content"] for chat in read_conversations(files / "cold_start.jsonl")}
    assert len(answered & others) == kept and {path.name for path in tmp_path.iterdir()} == {
        "kept.jsonl", "kept.answers.jsonl"
    }  # fmt: skip
    again = run(distill.main, *collecting(pretrained, "arithmetic:1", *few, "--out", out, "--at_least", 2, "--resume"))
    assert again.code == 2 and "64 answered before" in again.out and "none of 64 answers is fit" in again.err


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--mix_share", 1], "--mix_share 1: must be at least 0 and below 1"),
        (["--mix", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--ckpt", "x"], "a file holds answers alone; name a folder to train a student"),
    ],
)
def test_what_a_file_cannot_be_is_one_line(options, what, pretrained, tmp_path, run):
    done = run(distill.main, *collecting(pretrained, "arithmetic:1", "--out", tmp_path / "kept.jsonl", *options))
    assert done.code == 2 and what in done.err and done.err.count("\n") == 1


def test_a_generator_is_asked_until_enough_different_problems_came():
    report = RowReport()
    found = list(read_prompts(["arithmetic:1"], most=150, report=report))
    assert len({prompt.problem.question for prompt in found}) == len(found) == report.kept == 150 < report.rows


def test_the_old_command_prints_the_new_one(run):
    done = run(collect.main, "--ckpt", "a b", "--keep=2", "--data", "arithmetic:1", "--out", "kept.jsonl")
    assert done.code == 2 and done.err == (
        "error: collect.py has moved; run: python distill.py --method answers --teacher 'a b' --keep_answers 2 "
        "--data arithmetic:1 --out kept.jsonl\n"
    )


def test_the_table_shows_each_checkpoint(pretrained, tmp_path, run):
    both = f"{pretrained}/final,{pretrained}/final"
    options = ["--ckpt", both, "--data", "arithmetic:1-2", "--problems", 6, "--max_new_tokens", 6, "--dtype", "fp32"]
    done = run(lambda: call(reasoning, ""), *options, "--json", tmp_path / "table.json")
    assert done.code == 0, done.err
    one, two = json.loads((tmp_path / "table.json").read_text(encoding="utf8"))
    assert one == two and 0 <= one["correct"] <= 1 and 1 <= one["tokens"] <= 6
