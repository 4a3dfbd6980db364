"""Reading comprehension: a story of one or two sentences and a question whose answer stands in it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from text.world_cast import PLACES, THINGS, World, article, reserved
from text.world_facts import Exchange

WHEN = {
    "zh": ("", "早上，", "中午，", "下午，", "傍晚，", "昨天，", "放学以后，", "星期天，", "下雨天，"),
    "en": ("", "In the morning ", "At noon ", "In the evening ", "Yesterday ", "On Sunday ", "After lunch "),
}


@dataclass(frozen=True)
class Scene:
    """A story, and questions with their answers.

    Slots: a, b characters; x, y things; p, q places; `when` begins the story.
    """

    story: str
    questions: tuple[tuple[str, str], ...]


SCENES = {
    "zh": (
        Scene(
            "{when}{a}在{p}捡到了{x}。",
            (
                ("{a}捡到了什么？", "{a}捡到了{x}。"),
                ("{a}在哪里捡到了{bare}？", "{a}在{p}捡到了{bare}。"),
                ("谁捡到了{bare}？", "{a}捡到了{bare}。"),
            ),
        ),
        Scene(
            "{when}{a}在{p}遇见了{b}，送给它{x}。",
            (
                ("{a}在哪里遇见了{b}？", "{a}在{p}遇见了{b}。"),
                ("{a}在{p}遇见了谁？", "{a}在{p}遇见了{b}。"),
                ("{a}送给{b}什么？", "{a}送给{b}{x}。"),
            ),
        ),
        Scene(
            "{when}{a}去了{p}，{b}去了{q}。",
            (("{a}去了哪里？", "{a}去了{p}。"), ("{b}去了哪里？", "{b}去了{q}。"), ("谁去了{q}？", "{b}去了{q}。")),
        ),
        Scene(
            "{when}{a}买了{x}，{b}买了{y}。",
            (("{a}买了什么？", "{a}买了{x}。"), ("{b}买了什么？", "{b}买了{y}。"), ("谁买了{x}？", "{a}买了{x}。")),
        ),
        Scene(
            "{when}{a}把{x}忘在了{p}。后来，{b}帮它找了回来。",
            (
                ("{a}把{bare}忘在了哪里？", "{a}把{bare}忘在了{p}。"),
                ("{a}把什么忘在了{p}？", "{a}把{x}忘在了{p}。"),
                ("谁帮{a}找回了{bare}？", "{b}帮{a}找回了{bare}。"),
            ),
        ),
        Scene(
            "{when}{a}带着{x}去{p}，路上碰到了{b}。",
            (
                ("{a}去哪里？", "{a}去{p}。"),
                ("{a}路上碰到了谁？", "{a}路上碰到了{b}。"),
                ("{a}带着什么？", "{a}带着{x}。"),
            ),
        ),
    ),
    "en": (
        Scene(
            "{when}{a} found {x} in {p}.",
            (
                ("What did {a} find?", "{a} found {x}."),
                ("Where did {a} find it?", "{a} found it in {p}."),
            ),
        ),
        Scene(
            "{when}{a} met {b} in {p} and gave {b} {x}.",
            (("Who did {a} meet?", "{a} met {b}."), ("What did {a} give to {b}?", "{a} gave {b} {x}.")),
        ),
        Scene(
            "{when}{a} went to {p}, and {b} went to {q}.",
            (("Where did {a} go?", "{a} went to {p}."), ("Where did {b} go?", "{b} went to {q}.")),
        ),
        Scene(
            "{when}{a} bought {x}, and {b} bought {y}.",
            (("What did {a} buy?", "{a} bought {x}."), ("What did {b} buy?", "{b} bought {y}.")),
        ),
    ),
}


def scene(rng: random.Random, world: World, language: str, held_out: bool = False) -> tuple[str, list[Exchange]]:
    """A short story and its questions (without the story in them).

    Who does it with which thing is a reserved combination exactly when `held_out`.
    """
    template = rng.choice(SCENES[language])
    while True:
        a, b = (c.words[language]["n"] for c in rng.sample(world.known(language), 2))
        (x, bare), (y, _) = (_plain(thing, language) for thing in rng.sample(THINGS, 2))
        p, q = (place[language == "en"] for place in rng.sample(PLACES, 2))
        if reserved(a, x) == reserved(a, p) == held_out:
            break
    words = {"when": rng.choice(WHEN[language]), "a": a, "b": b, "x": x, "y": y, "bare": bare, "p": p, "q": q}
    exchanges = [
        Exchange("comprehension", language, question.format_map(words), answer.format_map(words))
        for question, answer in template.questions
    ]
    return template.story.format_map(words), exchanges


def _plain(thing: tuple[str, ...], language: str) -> tuple[str, str]:
    """一把雨伞 / an umbrella, and the bare word."""
    measure, noun, english = thing
    return (f"一{measure}{noun}", noun) if language == "zh" else (article(english), english)


def comprehension(rng: random.Random, world: World, language: str, held_out: bool = False) -> Exchange:
    """A short story with one question about it, as one exchange."""
    story, exchanges = scene(rng, world, language, held_out)
    exchange = rng.choice(exchanges)
    space = "" if language == "zh" else " "
    return exchange._replace(question=f"{story}{space}{exchange.question}")


def reading_document(rng: random.Random, world: World, language: str) -> str:
    """Two or three short stories, each with questions and answers, as in a school book."""
    parts = []
    for _ in range(rng.randint(2, 3)):
        story, exchanges = scene(rng, world, language)
        lines = [story]
        for exchange in rng.sample(exchanges, rng.randint(1, 2)):
            ask, answer = ("问：", "答：") if language == "zh" else ("Question: ", "Answer: ")
            lines += [ask + exchange.question, answer + exchange.answer]
        parts.append("\n".join(lines))
    return "\n".join(parts)
