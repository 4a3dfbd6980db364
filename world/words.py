"""Word skills: what class a thing belongs to, opposites, days of the week, and repeating a list of words."""

from __future__ import annotations

import random

from world.cast import article, reserved
from world.facts import Exchange, exchange
from world.grammar import sentences


def classes(language: str) -> dict[str, list[str]]:
    """Return the things of every class."""
    return {name: things.split() for name, things in sentences("skills")[language]["classes"].items()}


def class_statement(thing: str, name: str, language: str) -> str:
    """苹果是水果。 / A peach is a fruit. The canonical answer, too."""
    return sentences("skills")[language]["class"]["answer"].format_map(_of_class(language, thing, name))


def _of_class(language: str, thing: str, name: str, first: str = "", second: str = "") -> dict[str, str]:
    """Return the words of a question about a class; in English each with its article."""
    words = {"thing": thing, "name": name, "first": first or name, "second": second or name}
    words = words if language == "zh" else {key: article(word) for key, word in words.items()}
    return words | {"Thing": words["thing"][:1].upper() + words["thing"][1:]}


def class_question(rng: random.Random, language: str, held_out: bool = False) -> Exchange:
    """Ask which of two classes a thing belongs to. Held out is the thing together with the wrong class."""
    table = classes(language)
    while True:
        name, wrong = rng.sample(sorted(table), 2)
        thing = rng.choice(table[name])
        if reserved("class", thing, wrong) == held_out:
            break
    return exchange("class", language, **_of_class(language, thing, name, *rng.sample((name, wrong), 2)))


def antonyms(language: str) -> list[tuple[str, str, bool]]:
    """Return the pairs of opposites in both directions, and whether the plain question is held out.

    Of every third pair one direction is asked for in other words only; the question in plain words is held out.
    """
    pairs = sentences("skills")[language]["antonyms"]
    one_way = [(first, second, False) for first, second in pairs]
    return one_way + [(second, first, i % 3 == 1) for i, (first, second) in enumerate(pairs)]


def antonym_question(rng: random.Random, language: str, held_out: bool = False) -> Exchange:
    """Return the opposite of a word, asked plainly or in other words; a held-out question is plain."""
    form = sentences("skills")[language]["antonym"]
    plain, other = form["question"], form["other"]
    word, opposite, kept_back = rng.choice([pair for pair in antonyms(language) if pair[2] or not held_out])
    question = plain if held_out else other if kept_back else rng.choice((plain, other))
    asked = exchange("antonym", language, word=word, opposite=opposite)
    return asked._replace(question=question.format(word=word))


def length_question(rng: random.Random) -> Exchange:
    """Ask how many characters a Chinese word has: every word is talked about, those of held-out questions too."""
    words = [word for pair in sentences("skills")["zh"]["antonyms"] for word in pair]
    word = rng.choice(words + [thing for things in classes("zh").values() for thing in things])
    return exchange("length", "zh", word=word, count="一两三"[len(word) - 1])


def weekday_question(rng: random.Random, language: str) -> Exchange:
    """Return the day before or after a day of the week. Seven days are too few to hold any out."""
    week, days = (sentences("skills")[language][part] for part in ("week", "days"))
    today, (word, offset) = rng.randrange(7), rng.choice(sorted(days.items()))
    words = {"today": week[today], "day": week[(today + offset) % 7], "word": word, "Word": word.capitalize()}
    return exchange("weekday", language, **words, verb="was" if offset < 0 else "is")


def copy_question(rng: random.Random, language: str, held_out: bool = False) -> Exchange:
    """Return a list of three or four words to be said again. Held-out lists begin with a reserved pair of words."""
    words = [thing for things in classes(language).values() for thing in things]
    while True:
        some = rng.sample(words, rng.randint(3, 4))
        if reserved("copy", *some[:2]) == held_out:
            break
    return exchange("copy", language, shown=sentences("skills")[language]["and"].join(some))
