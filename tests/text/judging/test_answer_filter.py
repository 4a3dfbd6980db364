"""Which answers of a teacher are fit to train on."""

from __future__ import annotations

import pytest

from text.judging.answer_filter import AnswerFilter, clean, is_well_formed, repeated, shortest_different


def test_cleaning_touches_white_space_alone_and_the_shortest_different_answers_are_taken():
    assert clean("\r\n a  b \t\r\n\r\n\n\nc\r") == "a  b\n\nc"
    code = "def f():\n    return 1\n\nprint(f())"
    assert clean(code) == code
    assert shortest_different(["bb", "aaa", "bb", "dddd", "c"], 3) == ["c", "bb", "aaa"]


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


REFUSALS = (
    "I'm sorry, but I can't help with that.", "I’m very sorry, I cannot do this.",
    "As an AI language model, I don't have feelings.", "I cannot assist with this request.",
    "很抱歉，我无法回答这个问题。", "对不起，我不能提供这些信息。", "作为一个人工智能助手，我无法判断。",
    "<think>hm</think>Sorry, I can't answer that.",
)  # fmt: skip
POLITE = (
    "I'm sorry to hear that. Try some tea.", "抱歉让你久等了，答案是7。", "Say: I can't help you, and leave.",
    "I can't believe it is 7, but it is.", "作为一个人工智能专业的学生，你应该先学数学。",
)  # fmt: skip


@pytest.mark.parametrize("text", REFUSALS + POLITE)
def test_refusals_are_seen_and_politeness_is_not_one(text):
    assert AnswerFilter().fault(clean(text)) == ("refusal" if text in REFUSALS else None)


def test_faults_have_their_names():
    limits = AnswerFilter(min_chars=3, max_chars=40)
    assert limits.fault("7") == "shorter than 3 characters"
    assert limits.fault("<think>a long thought</think>7") == "shorter than 3 characters"
    assert limits.fault("x" * 41) == "longer than 40 characters"
    assert limits.fault("<think>only thoughts</think>") == "empty" == limits.fault("")
    assert limits.fault("a\0b") == "has a NUL character"
    assert limits.fault("seven") is None


def test_repetition_is_that_of_runs_of_four():
    assert repeated("one two three") == 0
    assert repeated("all work and no play " * 20) > 0.9 and repeated("春眠不觉晓" * 20) > 0.9
    varied = " ".join(f"word{n} is not word{n + 1}" for n in range(40))
    assert repeated(varied) < 0.05
    # 50 runs, of which 25 are new
    words = [str(n) for n in range(26)]
    assert repeated(" ".join([*words, *words, "0"])) == pytest.approx(1 - 26 / 50)
