"""Reading comprehension: a story of one or two happenings and a question whose answer stands in it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from world.cast import World, article, reserved
from world.facts import Exchange
from world.grammar import joined, sentences

WHEN = {
    "zh": ("", "早上，", "中午，", "下午，", "傍晚，", "昨天，", "放学以后，", "星期天，", "下雨天，"),
    "en": ("", "In the morning ", "At noon ", "In the evening ", "Yesterday ", "On Sunday ", "After lunch "),
}


@dataclass(frozen=True)
class Happening:
    """Who did what, and what can be asked about it. The answer is always the happening itself, as a sentence.

    Slots: a who, b another character, x a thing, p a place. Who it was is asked where only one did anything.
    """

    told: str
    questions: tuple[str, ...]
    who: str


HAPPENINGS = {
    "zh": (
        Happening("{a}在{p}捡到了{x}", ("{a}捡到了什么？", "{a}在哪里捡到了{x}？"), "谁捡到了{x}？"),
        Happening("{a}在{p}遇见了{b}", ("{a}遇见了谁？", "{a}在哪里遇见了{b}？"), "谁遇见了{b}？"),
        Happening("{a}送给{b}{x}", ("{a}送给{b}什么？", "{a}把{x}送给了谁？"), "谁送给{b}{x}？"),
        Happening("{a}去了{p}", ("{a}去了哪里？",), "谁去了{p}？"),
        Happening("{a}买了{x}", ("{a}买了什么？",), "谁买了{x}？"),
        Happening("{a}把{x}忘在了{p}", ("{a}把什么忘在了{p}？", "{a}把{x}忘在了哪里？"), "谁把{x}忘在了{p}？"),
    ),
    "en": (
        Happening("{a} found {x} in {p}", ("What did {a} find?", "Where did {a} find {x}?"), "Who found {x}?"),
        Happening("{a} met {b} in {p}", ("Who did {a} meet?", "Where did {a} meet {b}?"), "Who met {b}?"),
        Happening("{a} gave {b} {x}", ("What did {a} give {b}?",), "Who gave {b} {x}?"),
        Happening("{a} went to {p}", ("Where did {a} go?",), "Who went to {p}?"),
        Happening("{a} bought {x}", ("What did {a} buy?",), "Who bought {x}?"),
    ),
}


def scene(rng: random.Random, world: World, language: str, held_out: bool = False) -> tuple[str, list[Exchange]]:
    """Return a short story and the questions about each of its happenings (without the story in them).

    Who does it with which thing, and in which place, are reserved combinations exactly when `held_out`.
    """
    happening = rng.choice(HAPPENINGS[language])
    told, exchanges = [], []
    count = rng.choice((1, 1, 2))
    asked = happening.questions if count > 1 else (*happening.questions, happening.who)
    for _ in range(count):
        while True:
            a, b = (c.words[language]["n"] for c in rng.sample(world.known(language), 2))
            thing, place = _thing(rng, language), rng.choice(sentences("cast")["places"])
            words = {"a": a, "b": b, "x": thing, "p": place[language == "en"]}
            used_up = any(word in clause for clause in told for word in words.values())
            if not used_up and reserved(a, words["x"]) == reserved(a, words["p"]) == held_out:
                break
        told.append(happening.told.format_map(words))
        end = "。" if language == "zh" else "."
        exchanges += [Exchange("comprehension", language, q.format_map(words), told[-1] + end) for q in asked]
    joined = "，".join(told) + "。" if language == "zh" else ", and ".join(told) + "."
    return rng.choice(WHEN[language]) + joined, exchanges


def comprehension(rng: random.Random, world: World, language: str, held_out: bool = False) -> Exchange:
    """Return a short story with one question about it, as one exchange."""
    story, exchanges = scene(rng, world, language, held_out)
    exchange = rng.choice(exchanges)
    return exchange._replace(question=joined([story, exchange.question], language))


def reading_document(rng: random.Random, world: World, language: str) -> str:
    """Return two or three short stories, each with questions and answers, as in a school book."""
    parts = []
    for _ in range(rng.randint(2, 3)):
        story, exchanges = scene(rng, world, language)
        parts += [story, questions_and_answers(rng.sample(exchanges, rng.randint(1, 2)), language)]
    return "\n".join(parts)


def questions_and_answers(exchanges: list[Exchange], language: str) -> str:
    """Return the exchanges as lines of a school book."""
    ask, answer = ("问：", "答：") if language == "zh" else ("Question: ", "Answer: ")
    return "\n".join(f"{ask}{exchange.question}\n{answer}{exchange.answer}" for exchange in exchanges)


def _thing(rng: random.Random, language: str) -> str:
    """一把雨伞 / an umbrella."""
    measure, noun, english = rng.choice(sentences("cast")["things"])
    return f"一{measure}{noun}" if language == "zh" else article(english)
