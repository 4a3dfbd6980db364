"""Pages of a school book: arithmetic, comparisons, counting, classes, opposites and days, stated in many forms."""

from __future__ import annotations

import random

from text.chats.arithmetic import addends
from world.cast import World
from world.columns import explained
from world.facts import Exchange
from world.grammar import joined, sentences
from world.numbers import arithmetic, comparison, counting, sequence, two_numbers
from world.reading import questions_and_answers, reading_document
from world.words import (
    antonym_question,
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
    pages = (_class_page, _antonym_page, _week_page, copy_page, _length_page if language == "zh" else copy_page)
    return rng.choices(pages, weights=(32, 30, 8, 24, 6))[0](rng, world, language)


def lesson(rng: random.Random, world: World, language: str) -> str:
    """Return any page of the book."""
    pages = (arithmetic_page, number_page, word_page, reading_document)
    return rng.choices(pages, weights=(32, 24, 21, 28))[0](rng, world, language)


def _asked(rng: random.Random, world: World, exchanges: list[Exchange], language: str) -> str:
    """Return questions that somebody asks, each with its answer."""
    name = rng.choice(world.known(language)).words[language]["n"]
    head = sentences("skills")[language]["quiz"].format(name)
    return f"{head}\n{questions_and_answers(exchanges, language)}"


def _calculation(rng: random.Random) -> tuple[int, int]:
    return addends(rng, rng.choice((1, 1, 1, 2, 3)), held_out=False)


def _table(rng: random.Random, world: World, language: str) -> str:
    """Return sums and differences of one digit, in no order: 3加4等于7，8减2等于6。"""
    plus, minus, equals, stop = sentences("skills")[language]["table"]
    sums = []
    for _ in range(rng.randint(8, 14)):
        a = rng.randint(0, 9)
        b = rng.randint(0, 9 - a if rng.random() < 0.7 else 9)
        sums.append(f"{a}{plus}{b}{equals}{a + b}" if rng.random() < 0.55 else f"{a + b}{minus}{a}{equals}{b}")
    return sentences("skills")[language]["comma"].join(sums) + stop


def _signs(rng: random.Random, world: World, language: str) -> str:
    name = rng.choice(world.known(language)).words[language]["n"]
    lines = [rng.choice(sentences("skills")[language]["sums"]).format(name)]
    for _ in range(rng.randint(5, 10)):
        a, b = _calculation(rng)
        lines.append(f"{a}+{b}={a + b}" if rng.random() < 0.55 else f"{a + b}-{a}={b}")
    return "\n".join(lines)


def _words(rng: random.Random, world: World, language: str) -> str:
    answers = [arithmetic(rng, rng.choice(LEVELS), language).answer for _ in range(rng.randint(4, 8))]
    return joined(answers, language)


def _families(rng: random.Random, world: World, language: str) -> str:
    stated, form = [], sentences("skills")[language]["families"]
    for _ in range(rng.randint(2, 3)):
        a, b = _calculation(rng)
        stated.append(form.format(a=a, b=b, c=a + b))
    return joined(stated, language)


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
    stated, skills = [], sentences("skills")
    for _ in range(2):
        x, y = (c.words[language]["n"] for c in rng.sample(world.known(language), 2))
        noun, measure, english = rng.choice(skills["counted"][:7])
        a = b = 0
        while min(a, b) < 2:
            a, b = addends(rng, 1, held_out=False)
        form = skills[language]["given" if rng.random() < 0.5 else "taken"]
        words = {"x": x, "y": y, "measure": measure, "noun": noun if language == "zh" else english}
        stated.append(form.format(a=a, b=b, c=a + b, **words))
    return joined(stated, language)


def _compared(rng: random.Random, language: str) -> str:
    """Return a comparison as a statement, in one of several forms."""
    low, high = sorted(two_numbers(rng, held_out=False))
    return rng.choice(sentences("skills")[language]["compared"]).format(low, high)


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
    stated, forms = [], sentences("skills")[language]["antonym"]
    for word, opposite, _ in rng.sample(antonyms(language), 6):
        form = forms["answer"] if rng.random() < 0.75 else forms["pair"]
        stated.append(form.format(word=word, Word=word.capitalize(), opposite=opposite))
    return joined(stated, language)


def _week_page(rng: random.Random, world: World, language: str) -> str:
    if language == "en":
        return " ".join(f"{e.question} {e.answer}" for e in (weekday_question(rng, "en") for _ in range(3)))
    if rng.random() < 0.5:
        return _asked(rng, world, [weekday_question(rng, "zh") for _ in range(3)], "zh")
    today = rng.randrange(7)
    week, offsets = (sentences("skills")["zh"][part] for part in ("week", "days"))
    days = [f"{word}是{week[(today + offset) % 7]}" for word, offset in offsets.items()]
    c = rng.choice(world.characters)
    return f"今天是{week[today]}，{'，'.join(days)}。{c.name}打算{days[1][:2]}去{c.value('hobby')}。"


def copy_page(rng: random.Random, world: World, language: str) -> str:
    """Return lists of words, each to be said again."""
    return _asked(rng, world, [copy_question(rng, language) for _ in range(3)], language)


def _length_page(rng: random.Random, world: World, language: str) -> str:
    return _asked(rng, world, [length_question(rng) for _ in range(4)], language)
