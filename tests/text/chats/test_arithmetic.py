"""Arithmetic problems: right at every level, never a held-out sum in training, and the same from the same seed."""

from __future__ import annotations

import hashlib
import operator
import random
import re

import pytest

from text.chats.arithmetic import arithmetic_problem, has_held_out_sum


def numbers_in(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"[0-9]+", text)]


@pytest.mark.parametrize(
    ("held_out", "digest"),
    [
        (False, "0396d15bcd4a2a9219f5496699b6f8499e250939a34957a74c926e7cae8cd894"),
        (True, "3ee0181eb8849ff0acbcad62d6300518d3863609e4314e34b7bb4a8d9b7a42ab"),
    ],
)
def test_problems_stay_the_same_to_the_byte(held_out, digest):
    """Checkpoints trained on them, and the scores of others, are compared."""
    drawn = hashlib.sha256()
    for level in (1, 2, 3, 4):
        for number in range(500):
            drawn.update(repr(arithmetic_problem(random.Random(f"0/{number}"), level, held_out)).encode())
    assert drawn.hexdigest() == digest


def calculated(said: str) -> int:
    """12 + 3 - 4, from left to right: a product stands alone."""
    first, *steps = re.findall(r"([-+*]?)\s*(\d+)", said)
    value = int(first[1])
    for sign, number in steps:
        value = {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign](value, int(number))
    return value


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_arithmetic_answers_are_right_and_never_held_out(level):
    rng = random.Random(level)
    for _ in range(2000):
        question, answer = arithmetic_problem(rng, level)
        assert not has_held_out_sum(numbers_in(answer))
        for chinese, sign in (("加|plus", "+"), ("减|minus", "-"), ("乘|times|×", "*")):
            answer, question = (re.sub(chinese, sign, text) for text in (answer, question))
        said, result = re.split("等于|is", answer.rstrip("。."))
        assert calculated(said) == int(result) >= 0
        assert numbers_in(question) == numbers_in(said)


def test_harder_levels_have_larger_results_and_held_out_problems_are_recognised_as_leaks():
    means, rng = [], random.Random(0)
    for level in (1, 2, 3):
        means.append(sum(numbers_in(arithmetic_problem(rng, level)[1])[0] for _ in range(500)))
        for _ in range(200):
            assert has_held_out_sum(numbers_in(arithmetic_problem(rng, level, held_out=True)[1]))
    assert means[0] < means[1] < means[2]
    with pytest.raises(ValueError, match="level is 1, 2, 3 or 4"):
        arithmetic_problem(rng, 5)
