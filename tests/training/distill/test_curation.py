"""What is kept of a teacher's answers, rejection sampling into a file, and teachers that answer on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import collect
import distill
from cli import call
from eval.reasoning import reasoning
from model import MiniDeepSeek
from text.chats.conversations import read_conversations
from text.chats.prompts import to_prompt
from text.files import write_json_lines
from training.alignment.rewards import Rewards
from training.alignment.sampler import completion_texts, sample_groups, uniforms
from training.distill.answers import Answer, Ask, Failure
from training.distill.curation import AnswerSettings, curate
from training.distill.local_answers import TOO_LONG, CheckpointAnswers, open_local
from world.reasoning import generate

CPU = torch.device("cpu")


def chat(*turns: str) -> list[dict[str, str]]:
    """User and assistant alternating."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def test_what_is_kept_and_dropped_adds_up(tmp_path, capsys):
    prompts = [to_prompt({"question": "1+1?", "answer": "2"}), to_prompt({"prompt": "Say hello."})]
    thoughts = "<think>\nfirst\n</think>\nthen"
    texts = [["it is 2", " 2\n", "2", "3", "cut", "I say it is 2"]]
    texts += [["half \ud83d", thoughts, "", "half \ud83d", "an answer longer than the others", "never given"]]
    asks = [[Ask.of(p.messages, n) for n in range(6)] for p in prompts]
    pairs = [(ask, text) for i in (0, 1) for ask, text in zip(asks[i], texts[i], strict=True) if text != "never given"]
    known = {ask.key: Answer(text, "length" if text == "cut" else "stop") for ask, text in pairs}
    settings = AnswerSettings(samples=6, keep_answers=2)
    chats, answers = curate(prompts, asks, known, settings, Rewards.of({"correct": 1.0}), 99)
    assert [[c[0]["content"], c[-1]["content"]] for c in chats] == [
        ["1+1?", "2"], ["1+1?", "it is 2"], ["Say hello.", "half \ud83d"], ["Say hello.", thoughts]
    ]  # fmt: skip
    total, *dropped = capsys.readouterr().out.splitlines()
    assert total == "11 answers to 2 prompts: 4 kept, 2 of them unverified, 7 dropped; 0 prompts without an answer"
    assert sorted(dropped) == [
        "  1 x cut at the limit", "  1 x empty", "  1 x wrong", "  2 x duplicate", "  2 x more than --keep_answers"
    ]  # fmt: skip
    assert answers == 11
    write_json_lines(tmp_path / "a" / "c.jsonl", ({"messages": messages} for messages in chats))
    found = list(read_conversations(tmp_path / "a" / "c.jsonl"))  # half a character does not stop the file
    assert [*found[:2], found[3]] == [*chats[:2], chats[3]] and "half" in found[2][1]["content"]


# Rejection sampling


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("r1")
    generate(folder, few=20, many=300)
    return folder


def collecting(pretrained: Path, data: object, *more: object) -> list[object]:
    given = ["--method", "answers", "--teacher", pretrained / "final", "--data", data, "--max_new_tokens", 24]
    return [*given, "--dtype", "fp32", "--rewards", '{"overlong": 1}', *more]


def test_what_is_collected_goes_into_a_file_with_other_conversations(files, pretrained, tmp_path, run):
    out, few = tmp_path / "kept.jsonl", ["--prompts", 8, "--samples", 8]
    mixed = [*few, "--out", out, "--mix", files / "cold_start.jsonl", "--mix_share", 0.5]
    done = run(distill.main, *collecting(pretrained, "arithmetic:1", *mixed, "--at_least", -1))
    assert done.code == 0, done.err
    written, others = (list(read_conversations(file)) for file in (out, files / "cold_start.jsonl"))
    kept = int(re.search(r"(\d+) kept", done.out)[1])
    assert "64 answers to 8 prompts" in done.out and f"{kept} mixed in" in done.out and len(written) == 2 * kept > 0
    assert sum(chat in others for chat in written) == kept
    assert {path.name for path in tmp_path.iterdir()} == {"kept.jsonl", "kept.answers.jsonl"}
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


# Teachers on this machine


def ask(question: str, sample: int = 0) -> Ask:
    return Ask.of(chat(question), sample)


def test_a_checkpoint_answers_as_it_would_alone(pretrained, tokenizer):
    teacher = open_local(str(pretrained / "final"), 1.0, 8, 5, torch.float32, CPU)
    assert isinstance(teacher, CheckpointAnswers)
    asks = [ask("春天来了吗？"), ask("hello"), ask("hello", 1)]
    got = dict(teacher.answers(asks))
    assert set(got) == set(asks)
    for one in asks:
        ids = [1, tokenizer.special_ids["<|user|>"], *tokenizer.encode(one.messages[0]["content"])]
        drawn = uniforms([(5, int(one.key, 16))], 1, 8)
        (made,) = sample_groups(teacher.model, [[*ids, tokenizer.special_ids["<|assistant|>"]]], drawn, 2)
        assert got[one].text == completion_texts(tokenizer, made)[0]
        assert got[one].finish == ("stop" if made.ended[0] else "length") and got[one].tokens == made.lengths[0]
    assert got[asks[1]] != got[asks[2]]


def test_a_prompt_without_room_is_no_answer(pretrained):
    teacher = open_local(str(pretrained / "final"), 0.0, 8, 5, torch.float32, CPU)
    got = dict(teacher.answers([ask("很长的问题" * 600), ask("hello")]))
    assert sorted(map(type, got.values()), key=str) == [Answer, Failure]
    assert Failure(TOO_LONG) in got.values()


def test_transformers_and_we_give_the_same_greedy_answers(pretrained, monkeypatch):
    folder = str(pretrained / "final")
    asks = [ask(question) for question in ("春天来了吗？", "hello", "1加1等于几？")]
    ours = dict(open_local(folder, 0.0, 8, 0, torch.float32, CPU).answers(asks))
    monkeypatch.setattr("training.distill.teacher.is_ours", lambda name: False)
    theirs = dict(open_local(folder, 0.0, 8, 0, torch.float32, CPU).answers(asks))
    assert {a: answer.text for a, answer in ours.items()} == {a: answer.text for a, answer in theirs.items()}
    assert {a: answer.finish for a, answer in ours.items()} == {a: answer.finish for a, answer in theirs.items()}
    warm = open_local(folder, 1.0, 8, 0, torch.float32, CPU)
    samples = [ask("hello", sample) for sample in range(4)]
    got, again = (dict(warm.answers(samples)) for _ in range(2))
    assert got == again and len({answer.text for answer in got.values()}) > 1


def test_a_checkpoint_writes_a_file_and_a_fresh_student_learns_it(pretrained, tmp_path, run):
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"数到{n}。"}) + "\n" for n in range(30)), encoding="utf8")
    given = collecting(pretrained, data, "--sequence_length", 64, "--batch_tokens", 256, "--samples", 4)
    fresh = ["--student", "{preset: demo, hidden_size: 32, num_hidden_layers: 2}", "--max_steps", 2]
    out: Path = tmp_path / "out"
    done = run(distill.main, *given, "--max_new_tokens", 40, "--out", out, *fresh)
    assert done.code == 0, done.err
    assert MiniDeepSeek.from_pretrained(out / "final").config.hidden_size == 32
    assert (out / "final" / "tokenizer.json").read_text() == (pretrained / "final" / "tokenizer.json").read_text()


def test_the_same_weights_answer_the_same_in_another_folder_at_another_time(pretrained, tmp_path, run):
    found = []
    for folder in ("one", "two"):
        shutil.copytree(pretrained / "final", tmp_path / folder / "final")
        os.utime(tmp_path / folder / "final" / "model.safetensors", ns=(len(found), len(found)))
        few = ["--prompts", 8, "--samples", 8, "--at_least", -1, "--out", tmp_path / f"{folder}.jsonl"]
        done = run(distill.main, *collecting(tmp_path / folder, "arithmetic:1", *few))
        assert done.code == 0, done.err
        found.append((tmp_path / f"{folder}.answers.jsonl").read_text("utf8"))
    assert found[0] == found[1] and found[0].count("\n") == 64


def test_many_ranks_do_not_ask(pretrained, tmp_path, run, monkeypatch):
    monkeypatch.setattr(distill, "begin", lambda settings: distill.Ranks(0, 2, CPU))
    monkeypatch.setattr(distill.Ranks, "on_main", lambda ranks, work: work())
    done = run(distill.main, *collecting(pretrained, "arithmetic:1", "--out", tmp_path))
    assert done.code == 2 and "one process asks" in done.err
