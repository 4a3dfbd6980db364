"""Rewards: what good, bad, truncated, empty and adversarial completions are worth, and what a faulty reward says."""

from __future__ import annotations

import pytest

from errors import UserError
from text.chats.problems import Problem
from training.alignment.rewards import Rewards, Sample, find, names, reward

GOOD = "<think>\n3 apples\nand 4\n</think>\n<answer>\n7\n</answer>"
FLAT = "<think>3 and 4</think><answer>7</answer>"
TRUNCATED = "<think>\n3 apples\nand"
NESTED = "<think>\n<think>\n3\n</think>\n</think>\n<answer>\n7\n</answer>"
REPEATED = GOOD + "\n<answer>\n8\n</answer>"
SWAPPED = "<answer>\n7\n</answer>\n<think>\n3\n</think>"
WITHIN = "<think>\n<answer>\n7\n</answer>\n</think>"
OUTSIDE = "<think>\n3\n</think>\n<answer>\n\n</answer>\n7"
CHATTY = "Sure!\n" + GOOD


def worth(name: str, text: str, answer: str = "7", question: str = "How many?", **changes: object) -> float:
    sample = Sample(Problem(question, answer, "all"), text, **{"tokens": 10, "limit": 100, **changes})
    return find(name)([sample])[0]


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("7", GOOD), ("7", FLAT), ("7", "3加4等于7。"), ("7", "So 3+4=7"), ("-7", "3-10=-7"),
        ("0.5", "<answer>1/2</answer>"), ("1/2", "It is 0.50."), ("1000", "That makes $1,000."),
        ("1/2", r"Thus \boxed{\frac{1}{2}}."), ("7", "第一步3，第二步4\n#### 7"), ("12", "１２"),
        (r"\frac{3}{4}", "0.75"), (r"\sqrt{2}", r"\boxed{\sqrt 2}"), ("月牙镇", "<answer> 月牙镇。</answer>"),
        ("Blue", "<think>\nsky\n</think>\n<answer>\nblue.\n</answer>"),
    ],
)  # fmt: skip
def test_the_right_answer_earns_its_reward(wanted, text):
    assert worth("correct", text, wanted) == 1


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("7", ""), ("7", "   \n"), ("7", TRUNCATED + " 7"), ("7", NESTED.replace("7", "8")), ("7", REPEATED),
        ("7", OUTSIDE), ("7", WITHIN), ("7", "<answer>7"), ("7", "</answer>7<answer>"), ("7", "1 2 3 4 5 6 7 8"),
        ("7", "<answer>6 or 7 or 8</answer>"), ("7", r"\boxed{7} or rather \boxed{8}"),
        ("7", r"\boxed{3+4\,}"),  # the question is not its answer
        ("7", r"\boxed{7"), ("7", "3/0"), ("17", "7"), ("Blue", "blue or green"),
    ],
)  # fmt: skip
def test_no_other_text_earns_it(wanted, text):
    assert worth("correct", text, wanted) == 0


def test_a_problems_own_scoring_replaces_the_comparison():
    problem = Problem("Sort b a.", "a b", "sorting", score=lambda given: float(given.split() == ["a", "b"]))
    assert find("correct")([Sample(problem, "<answer>a   b</answer>", 5, 9)]) == [1.0]
    assert find("correct")([Sample(problem, "<answer>b a</answer>", 5, 9)]) == [0.0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # good, flat, truncated, nested, repeated, swapped, within, outside, chatty, empty
        ("strict_format", [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("loose_format", [1, 1, 0, 0, 0, 0, 0, 1, 1, 0]),
        ("tag_count", [1, 0, 0.25, 0.5, 0.5, 1, 1, 1, 1, 0]),
        ("digits_only", [1, 1, 0, 1, 0, 0, 0, 0, 1, 0]),
    ],
)  # fmt: skip
def test_formats(name, values):
    texts = [GOOD, FLAT, TRUNCATED, NESTED, REPEATED, SWAPPED, WITHIN, OUTSIDE, CHATTY, ""]
    assert [worth(name, text) for text in texts] == values


def test_the_strict_format_accepts_thoughts_over_many_lines():
    assert worth("strict_format", "<think>\na\n\nb\nc\n</think>\n<answer>\n7\napples\n</answer>\n") == 1
    assert worth("strict_format", "<think>\na</think>\n<answer>\n7\n</answer>") == 0


def test_digits_only_is_about_the_answer_alone():
    texts = ("12", "-3", "12 apples", "twelve", "１２", "1.5")
    assert [worth("digits_only", f"<answer>{text}</answer>") for text in texts] == [1, 1, 0, 0, 1, 0]


def test_near_rises_towards_the_right_number():
    assert [worth("near", text, "7") for text in ("7", "3加4等于6。", "8", "11", "-7", "none", "")] == [
        1, 0.5, 0.5, 0.2, 1 / 15, 0, 0,
    ]  # fmt: skip
    assert worth("near", "blue", "blue") == 0


def test_language_is_the_share_of_words_in_the_language_of_the_question():
    zh = dict(question="一共有几个？")
    assert worth("language", "一共有7个。", **zh) == 1
    assert worth("language", "<think>\n三 apples\n</think>", **zh) == 0.5
    assert worth("language", "seven apples") == 1
    assert worth("language", "七 apples don't", question="How many?") == pytest.approx(2 / 3)
    assert [worth("language", text, **zh) for text in ("", "7", "<think>", r"\frac{1}{2}")] == [0, 0, 0, 0]


def test_overlong_completions_lose_gradually_and_cut_ones_all():
    assert [worth("overlong", "x", tokens=n, limit=100) for n in (1, 80, 90, 100)] == [0, 0, -0.5, -1]
    assert worth("overlong", "x", tokens=10, limit=100, ended=False) == -1


def test_rewards_are_weighted_and_shown_by_name():
    totals, values = Rewards.of({"correct": 1.0, "tag_count": 0.5})(
        [Sample(Problem("?", "7", "all"), text, 5, 9) for text in (GOOD, "7", "")]
    )
    assert totals == [1.5, 1.0, 0.0] and values == {"correct": [1, 1, 0], "tag_count": [1, 0, 0]}


@reward
def vowels(sample: Sample) -> float:
    """A reward of one's own, made by the decorator."""
    return sum(letter in "aeiou" for letter in sample.text)


def broken(samples):
    raise ZeroDivisionError("division\nby zero")


FAULTY = {
    "broken": (broken, "failed with ZeroDivisionError: division by zero; fix it"),
    "nan": (lambda samples: [float("nan")] * len(samples), "gave nan for 'a banana'"),
    "short": (lambda samples: [1.0], "gave 1 numbers for 2 samples"),
    "words": (lambda samples: ["much"] * len(samples), "failed with ValueError: could not convert"),
    "nothing": (lambda samples: None, "failed with TypeError"),
}
SAMPLES = [Sample(Problem("?", "7", "all"), "a banana", 5, 9)] * 2


def test_a_reward_of_ones_own_comes_by_its_import_path():
    assert Rewards.of({f"{__name__}:vowels": 2.0})(SAMPLES)[0] == [8.0, 8.0]


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_reward_is_named_in_one_line(name):
    function, what = FAULTY[name]
    with pytest.raises(UserError) as raised:
        Rewards({name: function}, {name: 1.0})(SAMPLES)
    message = str(raised.value)
    assert message.startswith(f"reward '{name}': {what}") and "\n" not in message and "out of rewards" in message


@pytest.mark.parametrize(
    ("rewards", "what"),
    [
        ({}, "none given; choose from correct, digits_only, language, loose_format, near, overlong"),
        ({"corect": 1}, "'corect': not one of correct"),
        ({"correct": float("nan")}, "weight of 'correct' is nan"),
        ({"correct": "much"}, "weight of 'correct' is 'much'"),
        (
            {"no_such_module:f": 1},
            "cannot be imported .ModuleNotFoundError.*; name it MODULE:FUNCTION, and put",
        ),
        ({f"{__name__}:no_such": 1}, "cannot be imported .AttributeError"),
        ({f"{__name__}:GOOD": 1}, "is str; it must be a function"),
    ],
)
def test_a_wrong_choice_of_rewards_is_named(rewards, what):
    with pytest.raises(UserError, match=what):
        Rewards.of(rewards)


def test_the_rewards_of_the_project_are_listed():
    assert " ".join(names()) == "correct digits_only language loose_format near overlong strict_format tag_count"


def test_what_a_reward_says_to_people_is_not_wrapped_up():
    def refuses(samples):
        raise UserError("rules.txt: is missing; write it")

    with pytest.raises(UserError, match=r"^rules\.txt: is missing; write it$"):
        Rewards({"refuses": refuses}, {"refuses": 1.0})(SAMPLES)
