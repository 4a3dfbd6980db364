"""Pages of a school book: arithmetic, comparisons, counting, classes, opposites and days, stated in many forms."""

from __future__ import annotations

import random

from text.chats.arithmetic import addends
from world.cast import World
from world.columns import explained
from world.facts import Exchange
from world.grammar import joined
from world.numbers import COUNTED, arithmetic, comparison, counting, sequence, two_numbers
from world.reading import questions_and_answers, reading_document
from world.words import (
    DAYS_ZH,
    WEEKDAYS_ZH,
    antonym_question,
    antonym_statement,
    antonyms,
    class_question,
    class_statement,
    classes,
    copy_question,
    length_question,
    weekday_question,
)

LEVELS = (1, 1, 1, 1, 1, 2, 2, 2, 2, 3)


def arithmetic_page(rng: random.Random, world: World, language: str) -> str:
    """Return several calculations in one form, mostly sums of one digit: larger ones are made of them."""
    pages = (_table, _signs, _words, _families, _quiz, _word_problems, _columns)
    return rng.choices(pages, weights=(4, 1, 1, 1, 1, 1, 3))[0](rng, world, language)


def number_page(rng: random.Random, world: World, language: str) -> str:
    """Return comparisons, sequences and counting."""
    draw = rng.choice((_compared, comparison, sequence, counting))
    drawn = [draw(rng, language) for _ in range(rng.randint(3, 4))]
    return joined(drawn, language) if draw is _compared else _asked(rng, world, drawn, language)


def word_page(rng: random.Random, world: World, language: str) -> str:
    """Return classes, opposites, days of the week, lists said again, and the length of words."""
    pages = (_class_page, _antonym_page, _week_page, _copy_page, _length_page if language == "zh" else _copy_page)
    return rng.choices(pages, weights=(32, 30, 8, 24, 6))[0](rng, world, language)


def lesson(rng: random.Random, world: World, language: str) -> str:
    """Return any page of the book."""
    pages = (arithmetic_page, number_page, word_page, reading_document)
    return rng.choices(pages, weights=(32, 24, 21, 28))[0](rng, world, language)


def _asked(rng: random.Random, world: World, exchanges: list[Exchange], language: str) -> str:
    """Return questions that somebody asks, each with its answer."""
    name = rng.choice(world.known(language)).words[language]["n"]
    head = f"{name}出了几道题。" if language == "zh" else f"{name} asked some questions."
    return f"{head}\n{questions_and_answers(exchanges, language)}"


def _calculation(rng: random.Random) -> tuple[int, int]:
    return addends(rng, rng.choice((1, 1, 1, 2, 3)), held_out=False)


def _table(rng: random.Random, world: World, language: str) -> str:
    """Return sums and differences of one digit, in no order: 3加4等于7，8减2等于6。"""
    plus, minus, equals = ("加", "减", "等于") if language == "zh" else (" plus ", " minus ", " is ")
    sums = []
    for _ in range(rng.randint(8, 14)):
        a = rng.randint(0, 9)
        b = rng.randint(0, 9 - a if rng.random() < 0.7 else 9)
        sums.append(f"{a}{plus}{b}{equals}{a + b}" if rng.random() < 0.55 else f"{a + b}{minus}{a}{equals}{b}")
    return ("，" if language == "zh" else ", ").join(sums) + ("。" if language == "zh" else ".")


def _signs(rng: random.Random, world: World, language: str) -> str:
    name = rng.choice(world.known(language)).words[language]["n"]
    heads = ("口算练习", "算术本", "{}的算术本") if language == "zh" else ("Sums", "{}'s sums")
    lines = [rng.choice(heads).format(name)]
    for _ in range(rng.randint(5, 10)):
        a, b = _calculation(rng)
        lines.append(f"{a}+{b}={a + b}" if rng.random() < 0.55 else f"{a + b}-{a}={b}")
    return "\n".join(lines)


def _words(rng: random.Random, world: World, language: str) -> str:
    answers = [arithmetic(rng, rng.choice(LEVELS), language).answer for _ in range(rng.randint(4, 8))]
    return joined(answers, language)


def _families(rng: random.Random, world: World, language: str) -> str:
    sentences = []
    for _ in range(rng.randint(2, 3)):
        a, b = _calculation(rng)
        c = a + b
        if language == "zh":
            sentences.append(f"{a}加{b}等于{c}，{b}加{a}也等于{c}；{c}减{a}等于{b}，{c}减{b}等于{a}。")
        else:
            sentences.append(f"{a} plus {b} is {c}, so {c} minus {a} is {b}.")
    return joined(sentences, language)


def _quiz(rng: random.Random, world: World, language: str) -> str:
    drawn = [arithmetic(rng, rng.choice(LEVELS), language) for _ in range(rng.randint(2, 4))]
    return _asked(rng, world, drawn, language)


def _columns(rng: random.Random, world: World, language: str) -> str:
    """Return sums worked out: 个位1加6等于7，所以51加6等于57。"""
    shown: list[str] = []
    while len(shown) < 4:
        text = explained(arithmetic(rng, 2, language).question)
        shown += [text] if text else []
    return joined(shown, language)


def _word_problems(rng: random.Random, world: World, language: str) -> str:
    sentences = []
    for _ in range(2):
        x, y = (c.words[language]["n"] for c in rng.sample(world.known(language), 2))
        noun, measure, noun_en = rng.choice(COUNTED[:7])
        a = b = 0
        while min(a, b) < 2:
            a, b = addends(rng, 1, held_out=False)
        c = a + b
        plus = rng.random() < 0.5
        if language == "zh":
            if plus:
                told = f"{x}有{a}{measure}{noun}，{y}又给了它{b}{measure}，现在{x}一共有{c}{measure}{noun}。"
            else:
                told = f"{x}有{c}{measure}{noun}，送给{y}{a}{measure}，还剩下{b}{measure}{noun}。"
        elif plus:
            told = f"{x} had {a} {noun_en}s. {y} gave {x} {b} more, so now there are {c} {noun_en}s."
        else:
            told = f"{x} had {c} {noun_en}s and gave {a} of them to {y}, so {b} {noun_en}s were left."
        sentences.append(told)
    return joined(sentences, language)


def _compared(rng: random.Random, language: str) -> str:
    """Return a comparison as a statement, in one of several forms."""
    low, high = sorted(two_numbers(rng, held_out=False))
    if language == "zh":
        forms = ("{1}比{0}大。", "{0}比{1}小。", "{1}比{0}大，{0}比{1}小。", "{1}大于{0}。", "{0}小于{1}。")
    else:
        forms = ("{1} is larger than {0}.", "{0} is smaller than {1}.")
    return rng.choice(forms).format(low, high)


def _class_page(rng: random.Random, world: World, language: str) -> str:
    table = classes(language)
    name = rng.choice(sorted(table))
    if rng.random() < 0.3:
        return _asked(rng, world, [class_question(rng, language) for _ in range(3)], language)
    things = rng.sample(table[name], 6)
    sentences = [class_statement(thing, name, language) for thing in things]
    if language == "zh":
        heads = (f"{'、'.join(things)}，都是{name}。", f"月牙镇的商店里摆着{'、'.join(things[:3])}等{name}。", "")
        return rng.choice(heads) + "".join(sentences)
    return " ".join(sentences)


def _antonym_page(rng: random.Random, world: World, language: str) -> str:
    if rng.random() < 0.3:
        return _asked(rng, world, [antonym_question(rng, language) for _ in range(3)], language)
    sentences = []
    for word, opposite, _ in rng.sample(antonyms(language), 6):
        pair = (
            f"“{word}”和“{opposite}”是一对反义词。" if language == "zh" else f"{word.capitalize()} is not {opposite}."
        )
        sentences.append(antonym_statement(word, opposite, language) if rng.random() < 0.75 else pair)
    return joined(sentences, language)


def _week_page(rng: random.Random, world: World, language: str) -> str:
    if language == "en":
        return " ".join(f"{e.question} {e.answer}" for e in (weekday_question(rng, "en") for _ in range(3)))
    if rng.random() < 0.5:
        return _asked(rng, world, [weekday_question(rng, "zh") for _ in range(3)], "zh")
    today = rng.randrange(7)
    days = [f"{word}是{WEEKDAYS_ZH[(today + offset) % 7]}" for word, offset in DAYS_ZH.items()]
    c = rng.choice(world.characters)
    return f"今天是{WEEKDAYS_ZH[today]}，{'，'.join(days)}。{c.name}打算{days[1][:2]}去{c.value('hobby')}。"


def _copy_page(rng: random.Random, world: World, language: str) -> str:
    return _asked(rng, world, [copy_question(rng, language) for _ in range(3)], language)


def _length_page(rng: random.Random, world: World, language: str) -> str:
    return _asked(rng, world, [length_question(rng) for _ in range(4)], language)
