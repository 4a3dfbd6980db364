"""Answers are counted as they should be, on replies that are made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from likelihoods import values

from errors import UserError
from eval.questions import accuracy, ask, read_questions
from eval.suites.exact_match import ExactMatch
from eval.suites.quality import Quality, chinese_share, distinct, repetition
from eval.suites.replies import Questions, Style
from text.chats.chat_template import Message
from text.chats.problems import open_problems


class Parrot:
    """A model that says what it is told to; `asked` keeps what it was asked."""

    name, context, chats, bos, eos, dtype = "parrot", 1000, True, 1, 2, "fp32"

    def __init__(self, *replies: str, chats: bool = True) -> None:
        self.replies, self.asked, self.chats = list(replies), [], chats

    def encode(self, text: str) -> list[int]:
        return [5] * len(text)

    encode_bare = encode

    def encode_chat(self, messages: list[Message]) -> list[int]:
        return [5] * sum(len(message["content"]) for message in messages)

    def reply(self, prompts: list, max_new_tokens: int, temperature: float, seed: int) -> list[str]:
        self.asked += [(prompt, max_new_tokens, temperature, seed) for prompt in prompts]
        return [self.replies.pop(0) for _ in prompts]


def problems(path: Path, *rows: tuple[str, str]) -> str:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows), encoding="utf8")
    return str(path)


def test_answers_to_problems_are_compared_as_mathematics(tmp_path):
    data = problems(tmp_path / "p.jsonl", ("1+1?", "so it is #### 2"), ("half?", "1/2"), ("half?", "1/2"), ("3?", "3"))
    suite = ExactMatch(data=data)
    items, model = suite.items(0), Parrot("The answer is 2.", "\\boxed{\\frac{1}{2}}", "0.5", "4")
    assert len(items) == 4  # a question that is asked twice counts twice
    scores = suite.scores(items, suite.measure(model, items, 0))
    assert values(scores) == {"exact_match": 0.75} and (scores[0].items, scores[0].chance) == (4, None)


def test_several_samples_give_pass_at_k_and_the_majority(tmp_path):
    data = problems(tmp_path / "p.jsonl", ("1+1?", "2"), ("2+2?", "4"))
    suite = ExactMatch(data=data, samples=4, temperature=1.0, k=[1, 2, 4])
    items, model = suite.items(0), Parrot("2", "3", "it is 2", "3", "5", "5", "5.0", "4")
    rows = suite.measure(model, items, seed=7)
    assert [row["right"] for row in rows] == [[True, False, True, False], [False, False, False, True]]
    # 2 of 4: 1 - C(2,2)/C(4,2) = 5/6; 1 of 4: 1 - C(3,2)/C(4,2) = 1/2. The first vote is a draw, the second is lost.
    want = {"pass@1": 3 / 8, "pass@2": (5 / 6 + 1 / 2) / 2, "pass@4": 1.0, "maj@4": 0.25}
    assert values(suite.scores(items, rows)) == pytest.approx(want)
    assert {asked[1:] for asked in model.asked} == {(256, 1.0, 7)}


def test_worked_problems_come_first_as_turns_or_as_text(tmp_path):
    shots = problems(tmp_path / "s.jsonl", ("S1", "A1 #### 1"), ("S2", "A2 #### 2"))
    suite = ExactMatch(data=problems(tmp_path / "p.jsonl", ("Q", "3")), shots=2, shots_data=shots, system="Be brief.")
    chatting, plain = Parrot("3"), Parrot(" It is 3.\n\nQuestion: 4?\nAnswer: 5", chats=False)
    assert suite.measure(chatting, suite.items(0), 0)[0]["right"] == [True]
    assert [message["content"] for message in chatting.asked[0][0]] == [
        "Be brief.",
        "S1",
        "A1 #### 1",
        "S2",
        "A2 #### 2",
        "Q",
    ]
    assert suite.measure(plain, suite.items(0), 0)[0] == {"answers": ["It is 3."], "right": [True]}
    assert plain.asked[0][0] == (
        "Be brief.\n\nQuestion: S1\nAnswer: A1 #### 1\n\nQuestion: S2\nAnswer: A2 #### 2\n\nQuestion: Q\nAnswer:"
    )


def test_the_generators_held_out_sums_are_asked():
    items = ExactMatch(data="arithmetic:1-2", problems=6).items(0)
    sums = open_problems("arithmetic:1-2")
    assert items == sums.held_out(6) and [item.kind for item in items] == ["level 1", "level 2"] * 3
    assert not {item.question for item in items} & {sums.problem(number, 0).question for number in range(500)}
    assert len(items) == 6 and len(ExactMatch(data="arithmetic:1", problems=6).items(4)) == 4


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"samples": 4}, "samples 4: greedy answers are all the same"),
        ({"samples": 4, "temperature": 1.0, "k": [5]}, r"k \[5\]: each from 1 to samples = 4"),
        ({"shots": 3}, "shots 3: .* give a file"),
        ({"max_new_tokens": 0}, "must be 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, what):
    with pytest.raises(UserError, match=what):
        ExactMatch(data="arithmetic:1", **settings)


def test_a_problem_without_an_answer_is_named(tmp_path):
    data = problems(tmp_path / "p.jsonl", ("1+1?", "2"), ("2+2?", " "))
    with pytest.raises(UserError, match=r"p\.jsonl:2: the answer is empty; correct the row"):
        ExactMatch(data=data).items(0)


def test_a_question_that_has_no_room_gets_no_answer(tmp_path):
    model = Parrot("2")
    suite = ExactMatch(data=problems(tmp_path / "p.jsonl", ("x" * 990, "2"), ("1+1", "2")), max_new_tokens=20)
    assert [row["right"] for row in suite.measure(model, suite.items(0), 0)] == [[False], [True]] and len(
        model.asked
    ) == 1


def test_the_worlds_questions_are_counted_as_eval_questions_counts_them(own, world, tmp_path):
    lines = (world / "heldout_questions.jsonl").read_text(encoding="utf8").splitlines()[::12]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf8")
    asked = read_questions(path)
    replies = [result.reply for result in ask(own.answerer, asked)]
    rows = [json.loads(line) for line in lines]
    for place in (0, 3, 4):  # some of what it says is right
        rows[place]["answer"] = replies[place]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")
    suite = Questions(data=str(path))
    items = suite.items(0)
    scores = suite.scores(items, suite.measure(own, items, 0))
    want = accuracy(ask(own.answerer, read_questions(path)))
    assert {score.group: score.value for score in scores} == want and 0 < want["all"] < 1


def test_favours_in_style_are_counted(tmp_path):
    row = {"question": "Q", "answer": "你好！我去。再见。", "opening": "你好！", "closing": "再见。"}
    (tmp_path / "f.jsonl").write_text((json.dumps(row) + "\n") * 4, encoding="utf8")
    suite, model = (
        Style(data=str(tmp_path / "f.jsonl")),
        Parrot("你好！我去。再见。", "你好！我不去。再见。", "我去。", ""),
    )
    scores = suite.scores(suite.items(0), suite.measure(model, suite.items(0), 3))
    assert values(scores) == {"preferred": 0.5, "exact_match": 0.25} and model.asked[0][1:] == (48, 0.7, 3)


# Quality


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c d e f", 0.0),
        ("a b c d a b c d", 1 - 4 / 5),  # abcd bcda cdab dabc abcd
        ("好好好好好好", 1 - 1 / 3),
        ("a b c", 0.0),  # no four words
        ("", 0.0),
    ],
)
def test_repetition_is_the_share_of_four_words_that_stood_there_before(text, share):
    assert repetition(text) == pytest.approx(share)


def test_variety_and_language_are_counted_in_words():
    assert distinct(["a b a", "B c"], 1) == 3 / 5 and distinct(["a b a", "b c"], 2) == 1.0
    assert chinese_share("我 like 猫, 3!") == 0.5 and chinese_share("！？") == 0.0


def test_answers_are_described_without_a_judge(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "你好吗？"}\n{"prompt": "Who are you?"}\n', encoding="utf8")
    suite = Quality(data=str(path))
    replies = ["<think>\n想\n</think>\n<answer>\n我很好\n</answer>", ""]
    model = Parrot(*replies)
    found = values(suite.scores(suite.items(0), suite.measure(model, suite.items(0), 0)))
    assert found["characters"] == len(replies[0]) / 2 and found["empty"] == 0.5
    assert found["strict_format"] == found["loose_format"] == 0.5 and found["own_language"] == 0.5
    assert model.asked[0][1:] == (128, 0.7, 0)


def test_a_limit_takes_items_that_are_evenly_spread(world):
    suite = Questions(data=str(world / "heldout_questions.jsonl"))
    items = suite.items(0)
    assert suite.items(10) == [items[number * len(items) // 10] for number in range(10)]
    assert len({item.kind for item in suite.items(10)}) > 1
