"""Chats for supervised fine-tuning and the held-out questions that measure it."""

from __future__ import annotations

import random

from world.cast import Character, World, companion
from world.columns import explained
from world.facts import Exchange, fact_questions, introduction
from world.grammar import sentences
from world.numbers import arithmetic, comparison, counting, sequence, states_held_out
from world.reading import comprehension
from world.requests import courteous, either_style, polite_request
from world.stories import tell
from world.verses import recitation
from world.words import antonym_question, class_question, copy_question, length_question, weekday_question

# Shares of the chats' turns; facts come first because the world is made of them.
TURN_WEIGHTS = {
    "fact": 28, "comprehension": 22, "arithmetic": 20, "comparison": 8, "sequence": 8, "counting": 7, "class": 6,
    "antonym": 6, "length": 4, "copy": 5, "weekday": 1, "favour": 8, "talk": 4, "introduction": 1, "story": 1,
    "name": 1, "verse": 1,
}  # fmt: skip
# Held-out questions: kind -> how many in Chinese, in English. Little arithmetic: minutes do not teach it, and
# a later stage with rewards is measured on its own held-out problems (`text.chats.arithmetic`).
SUITE = {
    "fact": (120, 36),
    "comprehension": (40, 10),
    "arithmetic": (12, 4),
    "comparison": (15, 4),
    "sequence": (10, 2),
    "class": (12, 4),
    "antonym": (7, 1),
    "counting": (8, 3),
    "copy": (10, 2),
}
# Shares of the preference pairs: polite requests, where courtesy is preferred, and questions, where it is not.
PAIR_WEIGHTS = {"favour": 60, "fact": 15, "arithmetic": 5, "comparison": 5, "class": 5, "sequence": 5, "copy": 5}
ARITHMETIC_LEVELS = (1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4)
# The share of the calculations with columns that show them first. Said straight away a result is mostly wrong, with its
# columns mostly right: greedy answers follow the many, and only rewards make a habit of the few.
EXPLAINED = 0.45


def chat(rng: random.Random, world: World) -> dict[str, list[dict[str, str]]]:
    """Return one conversation of one to four questions, {"messages": [...]}, that meets no held-out question."""
    language = "zh" if rng.random() < 0.8 else "en"
    turns = _turns(rng, world, language)
    while states_held_out("\n".join(text for turn in turns for text in turn)):
        turns = _turns(rng, world, language)
    messages = (
        [{"role": "system", "content": rng.choice(sentences("chats")["system"][language])}]
        if rng.random() < 0.15
        else []
    )
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def preference(rng: random.Random, world: World) -> dict[str, str]:
    """Return two answers to one prompt, {"prompt", "chosen", "rejected"}, which differ in their courtesy alone."""
    language = "zh" if rng.random() < 0.8 else "en"
    kind = rng.choices(list(PAIR_WEIGHTS), weights=PAIR_WEIGHTS.values())[0]
    if kind == "favour":
        exchange = polite_request(rng, world, language)
        prompt, plain = exchange.question, exchange.answer
    else:
        prompt, plain = _exchange(rng, world, kind, language)[0]
        while states_held_out(prompt + plain):
            prompt, plain = _exchange(rng, world, kind, language)[0]
    ways = (courteous(plain, language), plain)
    chosen, rejected = ways if kind == "favour" else ways[::-1]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def held_out_questions(world: World) -> list[dict[str, str]]:
    """Return the suite: 300 different questions that no training text asks, in a fixed order."""
    rng = random.Random(f"{world.seed}/questions")
    rows = []
    for kind, counts in SUITE.items():
        for language, count in zip(("zh", "en"), counts, strict=True):
            drawn = _held_out_facts(rng, world, language, count) if kind == "fact" else {}
            while len(drawn) < count:
                exchange = _held_out(rng, world, kind, language, level=1 + len(drawn) % 2)
                drawn[exchange.question] = exchange
            for i, exchange in enumerate(drawn.values(), start=1):
                rows.append({"id": f"{kind}-{language}-{i:03d}", **exchange._asdict()})
    return rows


def _turns(rng: random.Random, world: World, language: str) -> list[tuple[str, str]]:
    turns = []
    if rng.random() < 0.08:
        turns.append(_talk(rng, "greetings", language))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        kind = rng.choices(list(TURN_WEIGHTS), weights=TURN_WEIGHTS.values())[0]
        turns += _exchange(rng, world, kind, language)
    if rng.random() < 0.08:
        turns.append(_talk(rng, "farewells", language))
    return turns


def _exchange(rng: random.Random, world: World, kind: str, language: str) -> list[tuple[str, str]]:
    """Return the turns of one question of `kind`; a fact may bring a follow-up question with it."""
    if kind == "fact":
        return _facts(rng, world, language)
    if kind == "talk":
        return [_talk(rng, "small_talk", language)]
    if kind == "verse":
        return [recitation(rng, language)]
    if kind in ("introduction", "story", "name"):
        return [_about(rng, world, kind, language)]
    if kind == "arithmetic":
        exchange = arithmetic(rng, rng.choice(ARITHMETIC_LEVELS), language)
        shown = explained(exchange.question) if rng.random() < EXPLAINED else None
        exchange = exchange._replace(answer=shown or exchange.answer)
    elif kind == "comprehension":
        exchange = comprehension(rng, world, language)
    elif kind == "favour":
        exchange = either_style(rng, polite_request(rng, world, language))
    elif kind == "length" and language == "zh":
        exchange = length_question(rng)
    elif kind in ("weekday", "length"):
        exchange = weekday_question(rng, language)
    else:
        exchange = DRAWS[kind](rng, language)
    return [(exchange.question, exchange.answer)]


DRAWS = {
    "comparison": comparison,
    "sequence": sequence,
    "counting": counting,
    "class": class_question,
    "antonym": antonym_question,
    "copy": copy_question,
}


def _held_out(rng: random.Random, world: World, kind: str, language: str, level: int) -> Exchange:
    if kind == "arithmetic":
        return arithmetic(rng, level, language, held_out=True)
    if kind == "comprehension":
        return comprehension(rng, world, language, held_out=True)
    return DRAWS[kind](rng, language, held_out=True)


def _held_out_facts(rng: random.Random, world: World, language: str, count: int) -> dict[str, Exchange]:
    """Return questions about held-out facts, by question; every such fact once before any is asked in other words."""
    facts = [fact_questions(c, c.held_out, language) for c in world.known(language)]
    rng.shuffle(facts)
    for wordings in facts:
        rng.shuffle(wordings)
    in_turn = [wordings[i] for i in range(len(facts[0])) for wordings in facts]
    return {exchange.question: exchange for exchange in in_turn[:count]}


def _facts(rng: random.Random, world: World, language: str) -> list[tuple[str, str]]:
    character = rng.choice(world.known(language))
    first, second = rng.sample(character.askable(), 2)
    exchange = rng.choice(fact_questions(character, first, language))
    turns = [(exchange.question, exchange.answer)]
    # After a friend's name it would be unclear who 它 is.
    if language == "zh" and first != "friend" and rng.random() < 0.15:
        turns.append(
            (sentences("chats")["follow_ups"]["zh"][second], fact_questions(character, second, "zh")[0].answer)
        )
    return turns


def _talk(rng: random.Random, kind: str, language: str) -> tuple[str, str]:
    question = rng.choice(list(sentences("chats")[kind][language]))
    return question, sentences("chats")["small_talk"][language][question]


def _about(rng: random.Random, world: World, kind: str, language: str) -> tuple[str, str]:
    """Return requests about characters. Story and portrait are functions of the request: a question has one answer."""
    character = rng.choice(world.known(language))
    words = character.words[language]
    if kind == "introduction":
        return rng.choice(sentences("chats")["introductions"][language]).format_map(words), introduction(
            character, language
        )
    if kind == "name":
        return _name(rng, rng.choice(world.characters), language)
    other = companion(rng, world, character, language)
    request = rng.choice(sentences("chats")["stories"][language]).format(a=words["n"], b=other.words[language]["n"])
    return request, tell(random.Random(f"{world.seed}/{request}"), world, character, other, language)


def _name(rng: random.Random, character: Character, language: str) -> tuple[str, str]:
    zh, romanised = character.name, character.words["zh"]["romanised"]
    if language == "zh":
        return f"{zh}的英文名字是什么？", f"{zh}的英文名字是{romanised}。"
    return f"What is {romanised}'s Chinese name?", f"{romanised}'s Chinese name is {zh}."
