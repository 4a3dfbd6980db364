"""Number skills: arithmetic, comparison, continuing a sequence, counting, and what is held out of them.

The held-out sums, pairs and sequences are the same for every seed, so no training text ever states one.
"""

from __future__ import annotations

import random
import re
from itertools import pairwise

from text.chats.arithmetic import has_held_out_sum, worded_problem
from world.cast import reserved
from world.facts import Exchange, exchange
from world.grammar import sentences


def held_out_comparison(a: int, b: int) -> bool:
    """Return whether comparing a with b, either way round, is kept for held-out questions."""
    low, high = sorted((a, b))
    return (5 * low + 7 * high) % 11 == 3


def held_out_sequence(start: int, step: int) -> bool:
    """Return whether continuing start, start + step, ..., start + 3 * step is kept for held-out questions."""
    return (start + 3 * step) % 9 == 2


def states_held_out(text: str) -> bool:
    """Return whether numbers of `text` could be read as a held-out sum, sequence or comparison."""
    numbers = [int(digits) for digits in re.findall(r"\d+", text)]
    if has_held_out_sum(numbers):
        return True
    for i in range(len(numbers) - 4):
        first, step = numbers[i], numbers[i + 1] - numbers[i]
        in_steps = step > 0 and numbers[i : i + 5] == [first + k * step for k in range(5)]
        if in_steps and held_out_sequence(first, step):
            return True
    for sentence in re.split(r"[。！？；\n.!?;]", text) if re.search("比|大于|小于|larger|smaller", text) else ():
        pair = [int(digits) for digits in re.findall(r"\d+", sentence)]
        if any(a != b and held_out_comparison(a, b) for a, b in pairwise(pair)):
            return True
    return False


def arithmetic(rng: random.Random, level: int, language: str, held_out: bool = False) -> Exchange:
    """Return a problem of `level` as an exchange in `language`."""
    return Exchange("arithmetic", language, *worded_problem(rng, level, language, held_out))


def two_numbers(rng: random.Random, held_out: bool) -> list[int]:
    """Return two different numbers up to 50 to be compared, in random order."""
    while True:
        pair = rng.sample(range(1, 51), 2)
        if held_out_comparison(*pair) == held_out:
            return pair


def comparison(rng: random.Random, language: str, held_out: bool = False) -> Exchange:
    """Ask which of two numbers is larger, or smaller."""
    a, b = two_numbers(rng, held_out)
    larger = rng.random() < 0.5
    loser, winner = sorted((a, b), reverse=not larger)
    word = sentences("skills")[language]["comparison"]["words"][larger]
    return exchange("comparison", language, a=a, b=b, word=word, winner=winner, loser=loser)


def sequence(rng: random.Random, language: str, held_out: bool = False) -> Exchange:
    """Return four numbers in equal steps, to be continued."""
    while True:
        start, step = rng.randint(0, 50), rng.choice((1, 1, 2, 5, 10))
        if held_out_sequence(start, step) == held_out and start + 4 * step < 100:
            break
    shown = sentences("skills")[language]["comma"].join(str(start + k * step) for k in range(4))
    return exchange("sequence", language, shown=shown, following=start + 4 * step)


def counting(rng: random.Random, language: str, held_out: bool = False) -> Exchange:
    """Return one word said two to seven times, to be counted."""
    skills = sentences("skills")
    while True:
        (noun, measure, english), count = rng.choice(skills["counted"]), rng.randint(2, 7)
        if reserved("count", noun, count) == held_out:
            break
    noun = noun if language == "zh" else english
    shown = skills[language]["and"].join([noun] * count)
    return exchange("counting", language, shown=shown, measure=measure, noun=noun, count=count)
