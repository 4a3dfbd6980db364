"""Arithmetic problems in four levels, in Chinese and English, and which sums are held out of training.

Held-out sums are the same for every seed, so no training problem ever states one: a sum a + b is held out together with
b + a and with both subtractions that undo it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

SAID = {"zh": {"+": "加", "-": "减", "×": "乘"}, "en": {"+": " plus ", "-": " minus ", "×": " times "}}
WORDINGS = {
    "zh": (("请问{said}等于多少？", "算一算，{said}等于几？", "请计算：{signs}=？"), "{said}等于{result}。"),
    "en": (("What is {said}?", "Please work out {signs}."), "{said} is {result}."),
}


def arithmetic_problem(rng: random.Random, level: int, held_out: bool = False) -> tuple[str, str]:
    """Return a question and its canonical answer, whose last number is the result.

    Level 1: sums and differences up to 20. Level 2: a two-digit number and a one-digit one, without carry.
    Level 3: two two-digit numbers, or a product up to 81. Level 4: two steps with results from 0 to 198.
    Four questions in five are Chinese. The same state of `rng` gives the same problem.

    held_out: whether (the first step of) the problem is a held-out sum, for measuring only, or never one.
    """
    return worded_problem(rng, level, "zh" if rng.random() < 0.8 else "en", held_out)


def worded_problem(rng: random.Random, level: int, language: str, held_out: bool = False) -> tuple[str, str]:
    """Return `arithmetic_problem` in `language`. Raises `ValueError` for an unknown level."""
    numbers, signs, result = _calculation(rng, level, held_out)
    questions, answer = WORDINGS[language]
    said, plain = str(numbers[0]), str(numbers[0])
    for sign, number in zip(signs, numbers[1:], strict=True):
        said += f"{SAID[language][sign]}{number}"
        plain += f"{sign}{number}"
    return rng.choice(questions).format(said=said, signs=plain), answer.format(said=said, result=result)


def is_held_out(a: int, b: int) -> bool:
    """Return whether a + b, b + a, (a + b) - a and (a + b) - b are kept for held-out questions."""
    low, high = sorted((a, b))
    # One-digit sums are what the larger ones are built from, so all of them are taught. A number and its double are
    # taught too, as counting by a step, 10 20 30, states their sum.
    return low >= 2 and high >= 10 and high != 2 * low and (3 * low + 5 * high) % 8 == 1


def has_held_out_sum(numbers: Sequence[int]) -> bool:
    """Return whether three numbers in a row could be read as a held-out sum, in any order."""
    windows = (sorted(numbers[i : i + 3]) for i in range(len(numbers) - 2))
    return any(a + b == c and is_held_out(a, b) for a, b, c in windows)


def addends(rng: random.Random, level: int, held_out: bool = False) -> tuple[int, int]:
    """Draw two numbers: with a sum up to 20 at level 1, without carry at 2, both of two digits at 3."""
    while True:
        if level == 1:
            total = rng.randint(2, 20)
            a = rng.randint(0, total)
            b = total - a
        elif level == 2:
            a, b = 10 * rng.randint(2, 9) + rng.randint(0, 9), rng.randint(1, 9)
        else:
            a, b = rng.randint(11, 99), rng.randint(11, 99)
        if is_held_out(a, b) == held_out and (level != 2 or a % 10 + b < 10):
            return (a, b) if rng.random() < 0.5 else (b, a)


def _calculation(rng: random.Random, level: int, held_out: bool) -> tuple[list[int], list[str], int]:
    """Draw numbers, the signs between them, and the result. No other step than the first is ever a held-out sum."""
    if level not in (1, 2, 3, 4):
        raise ValueError(f"level is 1, 2, 3 or 4, not {level}")
    if level == 3 and not held_out and rng.random() < 0.3:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        return [a, b], ["×"], a * b
    if level < 4:
        return _one_step(rng, level, held_out)
    while True:
        numbers, signs, middle = _one_step(rng, rng.choice((1, 2, 2, 3)), held_out)
        last = rng.randint(1, 20)
        sign = rng.choice("+-")
        result = middle + last if sign == "+" else middle - last
        second = (middle, last) if sign == "+" else (result, last)
        if result >= 0 and not is_held_out(*second) and not has_held_out_sum([*numbers, last, result]):
            return [*numbers, last], [*signs, sign], result


def _one_step(rng: random.Random, level: int, held_out: bool) -> tuple[list[int], list[str], int]:
    a, b = addends(rng, level, held_out)
    return ([a, b], ["+"], a + b) if rng.random() < 0.55 else ([a + b, a], ["-"], b)
