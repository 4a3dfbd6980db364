"""Questions and styles are counted to the letter, and the report compares the stages."""

from __future__ import annotations

import json
import shutil

import pytest
from data_files import write

from errors import UserError
from eval.answering import Answerer
from eval.questions import Question, Result, accuracy, questions, read_questions
from eval.report import report
from eval.style import PoliteRequest, in_style, read_polite_requests, score_style, style
from model.decoding.sampling import Sampling

REQUEST = PoliteRequest("请把书交给阿橘。", "你好！我把书交给阿橘。很高兴帮到你。", "你好！", "很高兴帮到你。")


def test_accuracy_is_exact_answers_by_kind():
    asked = [Question("1+1", "2", "sum"), Question("2+2", "4", "sum"), Question("色?", "红", "fact")]
    results = [Result(asked[0], " 2\n"), Result(asked[1], "4."), Result(asked[2], "红")]
    assert [result.correct for result in results] == [True, False, True]
    assert accuracy(results) == {"sum": 0.5, "fact": 1.0, "all": pytest.approx(2 / 3)}


def test_questions_are_asked_and_counted(answerer, pretrained, tmp_path, script):
    """The model's own words are the right answers to two of three questions."""
    texts = ["你好", "月牙镇在哪里？谁住在那里？", "2 + 3 = ?"]
    said = [next(answerer.replies([[{"role": "user", "content": text}]], 48)) for text in texts]
    answers = [*said[:2], "never \u2028 said"]
    rows = [{"question": question, "answer": answer} for question, answer in zip(texts, answers, strict=True)]
    rows[0]["kind"] = rows[2]["kind"] = "talk"
    path = write(tmp_path / "asked.jsonl", rows)
    options = ["--ckpt", pretrained / "final", "--file", path, "--device", "cpu", "--dtype", "fp32"]
    done = script(questions, *options, "--json")
    assert json.loads(done.out) == {"talk": 0.5, "all": pytest.approx(2 / 3)}
    shown = script(questions, *options).out
    assert "50.0%" in shown and "66.7%" in shown and "expected never" in shown and texts[2] in shown


@pytest.mark.parametrize("read", [read_questions, read_polite_requests])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (json.dumps(vars(REQUEST)) + '\n{"question": "a"}\n', ":2: not an object with"),
        ('{"question": "a", "ans', r":1: broken JSON \(.*\); fix or delete the line$"),
        ("[1]\n", ":1: element 1: not an object with"),
        ("\n", ": is empty; name a file that has rows"),
        (None, ": no such file or folder"),
    ],
)  # fmt: skip
def test_questions_and_requests_that_cannot_be_read_are_named(content, what, read, tmp_path):
    path = tmp_path / "asked.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf8")
    with pytest.raises(UserError, match=f"^{path}{what}"):
        read(path)


@pytest.mark.parametrize(
    ("reply", "counts"),
    [
        ("你好！我把书交给阿橘。很高兴帮到你。", True),
        (" 你好！我把书交给别人。很高兴帮到你。\n", True),  # style is not content
        ("我把书交给阿橘。", False),
        ("你好！我把书交给阿橘。", False),
        ("我把书交给阿橘。很高兴帮到你。", False),
        ("你好！很高兴帮到你。", False),  # nothing in between
        ("你好！我把书交给阿橘。很高兴帮到你。再见", False),
        ("", False),
    ],
)
def test_a_style_is_its_two_ends_with_something_between(reply, counts):
    assert in_style(reply, REQUEST) == counts


def test_the_rate_of_a_style_is_sampled_and_repeats(answerer, pretrained, tmp_path, script, monkeypatch):
    """Half of the replies are in style, a quarter the preferred answer."""
    requests, asked = [REQUEST] * 4, []
    replies = [REQUEST.answer, "你好！很久。很高兴帮到你。", "我把书交给阿橘。", ""]
    monkeypatch.setattr(Answerer, "replies", lambda *given: asked.append(given[-2:]) or replies)
    assert score_style(answerer, requests) == {"preferred": 0.5, "exact": 0.25, "answers": 4}
    assert asked == [(Sampling(temperature=0.7), 0)]
    monkeypatch.undo()
    path = write(tmp_path / "requests.jsonl", [vars(REQUEST)])
    printed = [script(style, "--ckpt", pretrained / "final", "--file", path, "--json").out for _ in range(2)]
    assert printed[0] == printed[1] and json.loads(printed[0])["answers"] == 1


def test_the_report_holds_out_problems_of_a_file(pretrained, tmp_path, script):
    shutil.copytree(pretrained, tmp_path / "pretrain")
    rows = [{"question": f"What is {number} plus 1?", "answer": str(number + 1)} for number in range(40)]
    given = ["--out", tmp_path, "--sums", write(tmp_path / "sums.jsonl", rows), "--dtype", "fp32"]
    done = script(report, *given, "--val_fraction", 0.1)
    assert done.code == 0, done.err
    done = script(report, *given, "--val_fraction", 0)
    assert done.code == 2 and "nothing is held out; raise --val_fraction" in done.err


@pytest.mark.parametrize("stage", ["pretrain/step-3", "sft/final"])
def test_a_folder_without_finished_pretraining_is_named(stage, tmp_path, script):
    (tmp_path / stage).mkdir(parents=True)
    done = script(report, "--out", tmp_path)
    assert done.code == 2 and done.err.startswith(f"error: {tmp_path}: no finished pretraining in it")
