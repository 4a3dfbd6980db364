"""Prompts out of any data, answers that are fit to learn from, and teachers that answer on this machine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import distill
from errors import UserError
from model import MiniDeepSeek
from text.chats.conversations import read_conversations, write_chats
from text.chats.prompts import read_prompts, to_prompt
from text.judging.answer_filter import AnswerFilter, clean, is_well_formed, repeated, shortest_different
from text.sources.row_report import RowError, RowReport
from training.alignment.rewards import Rewards
from training.alignment.sampler import completion_texts, sample_groups, uniforms
from training.distill.answers import Answer, Ask, Failure
from training.distill.curation import AnswerSettings, curate, fit
from training.distill.local_answers import TOO_LONG, CheckpointAnswers, open_local

CPU = torch.device("cpu")
QUESTION, REPLY = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def chat(*turns: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


# Prompts


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
    path, report = tmp_path / "p.jsonl", RowReport()
    rows = [{"prompt": "a"}, {"prompt": "a"}, {"text": "?"}, {"prompt": "b", "system": "own"}, {"prompt": "c"}]
    rows[3] = {"messages": [{"role": "system", "content": "own"}, *chat("b")]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    found = list(read_prompts([str(path)], "S", report=report))
    assert [[m["content"] for m in prompt.messages] for prompt in found] == [["S", "a"], ["own", "b"], ["S", "c"]]
    assert report.problems == {"unknown layout": 1, "question asked before": 1}
    assert report.rows == 5 and report.kept == 3 and f"{path}:3" in report.examples["unknown layout"][0]
    with pytest.raises(UserError, match=r"p.jsonl:3: has 'text'"):
        list(read_prompts([str(path)], on_error="stop"))
    assert len(list(read_prompts([str(path)], most=1))) == 1


def test_generators_are_asked_for_as_many_as_wanted():
    found = list(read_prompts(["arithmetic:1-2"], most=20, seed=3))
    assert 15 <= len(found) <= 20 and all(prompt.problem.answer for prompt in found)
    assert found == list(read_prompts(["arithmetic:1-2"], most=20, seed=3))


def test_no_prompt_at_all_is_one_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": 1}\n', encoding="utf8")
    with pytest.raises(UserError, match=r"no prompt to ask; 1 rows, all skipped: 1 x unknown layout"):
        list(read_prompts([str(tmp_path / "p.jsonl")]))


# Cleaning and filtering


def test_cleaning_touches_white_space_alone():
    assert clean("\r\n a  b \t\r\n\r\n\n\nc\r") == "a  b\n\nc"
    code = "def f():\n    return 1\n\nprint(f())"
    assert clean(code) == code


@pytest.mark.parametrize(
    ("text", "well"),
    [
        ("no thoughts", True),
        ("<think>so</think>answer", True),
        ("<think>so", False),
        ("so</think>answer", False),
        ("first <think>so</think> answer", False),
        ("<think>a<think>b</think></think>c", False),
        ("<think>a</think>b<think>c</think>d", False),
    ],
)
def test_thoughts_are_one_closed_part_at_the_beginning(text, well):
    assert is_well_formed(text) is well


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m very sorry, I cannot do this.",
        "As an AI language model, I don't have feelings.",
        "I cannot assist with this request.",
        "很抱歉，我无法回答这个问题。",
        "对不起，我不能提供这些信息。",
        "作为一个人工智能助手，我无法判断。",
        "<think>hm</think>Sorry, I can't answer that.",
    ],
)
def test_refusals_are_seen(text):
    assert AnswerFilter().fault(clean(text)) == "refusal"


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that. Try some tea.",
        "抱歉让你久等了，答案是7。",
        "Say: I can't help you, and leave.",
        "I can't believe it is 7, but it is.",
        "作为一个人工智能专业的学生，你应该先学数学。",
    ],
)
def test_polite_answers_are_no_refusals(text):
    assert AnswerFilter().fault(text) is None


def test_faults_have_their_names():
    wanted = AnswerFilter(min_chars=3, max_chars=40)
    assert wanted.fault("7") == "shorter than 3 characters"
    assert wanted.fault("<think>a long thought</think>7") == "shorter than 3 characters"
    assert wanted.fault("x" * 41) == "longer than 40 characters"
    assert wanted.fault("<think>only thoughts</think>") == "empty" == wanted.fault("")
    assert wanted.fault("a\0b") == "has a NUL character"
    assert wanted.fault("seven") is None


def test_repetition_is_that_of_runs_of_four():
    assert repeated("one two three") == 0
    assert repeated("all work and no play " * 20) > 0.9 and repeated("春眠不觉晓" * 20) > 0.9
    varied = " ".join(f"word{n} is not word{n + 1}" for n in range(40))
    assert repeated(varied) < 0.05
    # 50 runs, of which 25 are new
    words = [str(n) for n in range(26)]
    assert repeated(" ".join([*words, *words, "0"])) == pytest.approx(1 - 26 / 50)


def test_the_shortest_different_ones_are_kept():
    assert shortest_different(["bb", "a", "bb", "ccc", "b"], 3) == ["a", "b", "bb"]


def test_what_is_kept_and_dropped_adds_up(tmp_path):
    prompts = [to_prompt({"question": "1+1?", "answer": "2"}), to_prompt({"prompt": "Say hello."})]
    told = [["it is 2", "2", "2", "3", "cut"], ["hello", "hi", "", "hello", "hey"]]
    asks = [[Ask.of(p.messages, n) for n in range(5)] for p in prompts]
    known = {
        ask.key: Answer(text, "length" if text == "cut" else "stop")
        for own, texts in zip(asks, told, strict=True)
        for ask, text in zip(own, texts, strict=True)
    }
    del known[asks[1][4].key]  # never answered
    settings = AnswerSettings(samples=5, keep_answers=1)
    chats, curated = curate(prompts, asks, known, settings, Rewards.of({"correct": 1.0}), 99)
    assert [c[-1]["content"] for c in chats] == ["2", "hi"] and [c[0]["content"] for c in chats] == [
        "1+1?",
        "Say hello.",
    ]
    assert curated.dropped == {
        "cut at the limit": 1, "wrong": 1, "duplicate": 2, "more than were wanted": 2, "empty": 1
    }  # fmt: skip
    assert curated.answers == 9 == curated.kept + curated.dropped.total() and curated.unverified == 1
    write_chats(tmp_path / "a" / "c.jsonl", chats)
    assert list(read_conversations(tmp_path / "a" / "c.jsonl")) == chats


def test_half_a_character_does_not_stop_the_file(tmp_path):
    write_chats(tmp_path / "c.jsonl", [[*chat("Q", "half \ud83d pair")]])
    assert "half" in next(iter(read_conversations(tmp_path / "c.jsonl")))[1]["content"]


def test_thoughts_are_kept_as_they_are():
    dropped: Counter[str] = Counter()
    text = "<think>\nfirst\n</think>\nthen"
    assert fit(Answer(f" {text}\n", "stop"), AnswerFilter(), dropped) == text and not dropped


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
    monkeypatch.setattr("training.distill.local_answers.is_ours", lambda name: False)
    theirs = dict(open_local(folder, 0.0, 8, 0, torch.float32, CPU).answers(asks))
    assert {a: answer.text for a, answer in ours.items()} == {a: answer.text for a, answer in theirs.items()}
    assert {a: answer.finish for a, answer in ours.items()} == {a: answer.finish for a, answer in theirs.items()}


def test_transformers_samples_where_it_is_warm(pretrained, monkeypatch):
    monkeypatch.setattr("training.distill.local_answers.is_ours", lambda name: False)
    asks = [ask("hello", sample) for sample in range(4)]
    teacher = open_local(str(pretrained / "final"), 1.0, 8, 0, torch.float32, CPU)
    got, again = (dict(teacher.answers(asks)) for _ in range(2))
    assert got == again and len({answer.text for answer in got.values()}) > 1


def test_a_checkpoint_writes_a_file_and_a_fresh_student_learns_it(pretrained, tmp_path, run):
    data = tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"数到{n}。"}) + "\n" for n in range(30)), encoding="utf8")
    given = ["--method", "answers", "--teacher", pretrained / "final", "--data", data, "--max_new_tokens", 40]
    given += ["--sequence_length", 64, "--batch_tokens", 256, "--dtype", "fp32", "--samples", 4]
    fresh = ["--student", "{preset: demo, hidden_size: 32, num_hidden_layers: 2}", "--max_steps", 2]
    out: Path = tmp_path / "out"
    done = run(distill.main, *given, "--out", out, *fresh)
    assert done.code == 0, done.err
    assert MiniDeepSeek.from_pretrained(out / "final").config.hidden_size == 32
    assert (out / "final" / "tokenizer.json").read_text() == (pretrained / "final" / "tokenizer.json").read_text()


def test_many_ranks_do_not_ask(pretrained, tmp_path, run, monkeypatch):
    monkeypatch.setattr(distill, "begin", lambda settings: distill.Ranks(0, 2, CPU))
    monkeypatch.setattr(distill.Ranks, "on_main", lambda ranks, work: work())
    done = run(
        distill.main,
        "--method",
        "answers",
        "--teacher",
        pretrained / "final",
        "--data",
        "arithmetic:1",
        "--out",
        tmp_path,
    )
    assert done.code == 2 and "one process asks" in done.err
