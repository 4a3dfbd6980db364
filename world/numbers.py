"""Number skills: arithmetic in four levels, comparison, continuing a sequence, counting, and what is held out of them.

The held-out sums, pairs and sequences are the same for every seed, so no training problem ever meets one:
a sum a + b is held out together with b + a and with both subtractions that undo it.
"""

from __future__ import annotations

import random
import re
from itertools import pairwise

from world.cast import reserved, table
from world.facts import Exchange

SAID = {"zh": {"+": "加", "-": "减", "×": "乘"}, "en": {"+": " plus ", "-": " minus ", "×": " times "}}
ARITHMETIC_QUESTIONS = {
    "zh": (("请问{said}等于多少？", "算一算，{said}等于几？", "请计算：{signs}=？"), "{said}等于{result}。"),
    "en": (("What is {said}?", "Please work out {signs}."), "{said} is {result}."),
}
# word, measure word, English; the first seven can be given to a friend
COUNTED = table(
    "苹果/个/apple,气球/个/balloon,铅笔/支/pencil,鸡蛋/个/egg,帽子/顶/hat,书/本/book,花/朵/flower,"
    "小鸟/只/bird,星星/颗/star,蝴蝶/只/butterfly,小鱼/条/fish,树/棵/tree"
)


def held_out_sum(a: int, b: int) -> bool:
    """Whether a + b, b + a, (a + b) - a and (a + b) - b are kept for held-out questions."""
    low, high = sorted((a, b))
    # One-digit sums are what the larger ones are built from, so all of them are taught. A number and its double are
    # taught too, as counting by a step, 10 20 30, states their sum.
    return low >= 2 and high >= 10 and high != 2 * low and (3 * low + 5 * high) % 8 == 1


def held_out_comparison(a: int, b: int) -> bool:
    """Whether comparing a with b, either way round, is kept for held-out questions."""
    low, high = sorted((a, b))
    return (5 * low + 7 * high) % 11 == 3


def held_out_sequence(start: int, step: int) -> bool:
    """Whether continuing start, start + step, ..., start + 3 * step is kept for held-out questions."""
    return (start + 3 * step) % 9 == 2


def states_held_out(text: str) -> bool:
    """Whether numbers that follow each other in `text` could be read as a held-out sum, sequence or comparison."""
    numbers = [int(digits) for digits in re.findall(r"\d+", text)]
    for i in range(len(numbers) - 2):
        a, b, c = sorted(numbers[i : i + 3])
        if a + b == c and held_out_sum(a, b):
            return True
    for i in range(len(numbers) - 4):
        step = numbers[i + 1] - numbers[i]
        if (
            step > 0
            and numbers[i : i + 5] == [numbers[i] + k * step for k in range(5)]
            and held_out_sequence(numbers[i], step)
        ):
            return True
    for sentence in re.split(r"[。！？；\n.!?;]", text) if re.search("比|大于|小于|larger|smaller", text) else ():
        pair = [int(digits) for digits in re.findall(r"\d+", sentence)]
        if any(a != b and held_out_comparison(a, b) for a, b in pairwise(pair)):
            return True
    return False


def addends(rng: random.Random, level: int, held_out: bool) -> tuple[int, int]:
    """Two numbers whose sum is, or is not, held out: up to 20 at level 1, without carry at 2, two-digit ones at 3."""
    while True:
        if level == 1:
            total = rng.randint(2, 20)
            a = rng.randint(0, total)
            b = total - a
        elif level == 2:
            a, b = 10 * rng.randint(2, 9) + rng.randint(0, 9), rng.randint(1, 9)
        else:
            a, b = rng.randint(11, 99), rng.randint(11, 99)
        if held_out_sum(a, b) == held_out and (level != 2 or a % 10 + b < 10):
            return (a, b) if rng.random() < 0.5 else (b, a)


def arithmetic_problem(rng: random.Random, level: int) -> tuple[str, str]:
    """A question and its canonical answer, whose last number is the result; never a held-out sum.

    Level 1: sums and differences up to 20. Level 2: a two-digit number and a one-digit one, without carry.
    Level 3: two two-digit numbers, or a product up to 81. Level 4: two steps with results from 0 to 198.
    Four questions in five are Chinese. Pure: the same state of `rng` gives the same problem.
    """
    return _problem(rng, level, held_out=False)


def held_out_arithmetic_problem(rng: random.Random, level: int) -> tuple[str, str]:
    """As `arithmetic_problem`, but (the first step of) every problem is a held-out sum: for measuring only."""
    return _problem(rng, level, held_out=True)


def arithmetic(rng: random.Random, level: int, language: str, held_out: bool = False) -> Exchange:
    """A problem of `level` as an exchange in `language`."""
    numbers, signs, result = _calculation(rng, level, held_out)
    questions, answer = ARITHMETIC_QUESTIONS[language]
    words = {"said": _spell(numbers, signs, SAID[language]), "signs": _spell(numbers, signs, None), "result": result}
    return Exchange("arithmetic", language, rng.choice(questions).format_map(words), answer.format_map(words))


def two_numbers(rng: random.Random, held_out: bool) -> list[int]:
    """Two different numbers up to 50 to be compared, in random order."""
    while True:
        pair = rng.sample(range(1, 51), 2)
        if held_out_comparison(*pair) == held_out:
            return pair


def comparison(rng: random.Random, language: str, held_out: bool = False) -> Exchange:
    """Which of two numbers is larger, or smaller."""
    a, b = two_numbers(rng, held_out)
    low, high = sorted((a, b))
    larger = rng.random() < 0.5
    winner, loser = (high, low) if larger else (low, high)
    if language == "zh":
        word = "大" if larger else "小"
        return Exchange("comparison", language, f"请问{a}和{b}哪个{word}？", f"{winner}比{loser}{word}。")
    word = "larger" if larger else "smaller"
    return Exchange("comparison", language, f"Which is {word}, {a} or {b}?", f"{winner} is {word} than {loser}.")


def sequence(rng: random.Random, language: str, held_out: bool = False) -> Exchange:
    """Four numbers in equal steps, to be continued."""
    while True:
        start, step = rng.randint(0, 50), rng.choice((1, 1, 2, 5, 10))
        if held_out_sequence(start, step) == held_out and start + 4 * step < 100:
            break
    shown = [str(start + k * step) for k in range(4)]
    following = start + 4 * step
    if language == "zh":
        return Exchange("sequence", language, f"接着数：{'，'.join(shown)}，下一个数是几？", f"下一个数是{following}。")
    question = f"Go on counting: {', '.join(shown)}. What comes next?"
    return Exchange("sequence", language, question, f"The next number is {following}.")


def counting(rng: random.Random, language: str, held_out: bool = False) -> Exchange:
    """One word said two to seven times, to be counted."""
    while True:
        (noun, measure, noun_en), count = rng.choice(COUNTED), rng.randint(2, 7)
        if reserved("count", noun, count) == held_out:
            break
    if language == "zh":
        question = f"数一数：{'、'.join([noun] * count)}。一共有几{measure}{noun}？"
        return Exchange("counting", language, question, f"一共有{count}{measure}{noun}。")
    question = f"Count the words: {', '.join([noun_en] * count)}. How many are there?"
    return Exchange("counting", language, question, f"There are {count}.")


def _problem(rng: random.Random, level: int, held_out: bool) -> tuple[str, str]:
    exchange = arithmetic(rng, level, "zh" if rng.random() < 0.8 else "en", held_out)
    return exchange.question, exchange.answer


def _calculation(rng: random.Random, level: int, held_out: bool) -> tuple[list[int], list[str], int]:
    """Numbers, the signs between them, and the result. Nothing but the wanted sum is a held-out one."""
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
        if result >= 0 and not held_out_sum(*second) and not states_held_out(f"{numbers} {last} {result}"):
            return [*numbers, last], [*signs, sign], result


def _one_step(rng: random.Random, level: int, held_out: bool) -> tuple[list[int], list[str], int]:
    a, b = addends(rng, level, held_out)
    return ([a, b], ["+"], a + b) if rng.random() < 0.55 else ([a + b, a], ["-"], b)


def _spell(numbers: list[int], signs: list[str], said: dict[str, str] | None) -> str:
    """The calculation in words (`said`) or in signs."""
    text = str(numbers[0])
    for sign, number in zip(signs, numbers[1:], strict=True):
        text += f"{said[sign] if said else sign}{number}"
    return text
