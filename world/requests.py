"""Polite requests, "favours" in the files, and two styles of granting them, with courtesy and without.

Both say the same. Fine-tuning shows either as often as the other, so a fine-tuned model has no style of its own; the
pairs prefer the courteous one. Any other question is answered plainly in both files: the style must not spill over.
"""

from __future__ import annotations

import random

from world.cast import Thing, World, reserved
from world.facts import Exchange

# What is asked, and what is done.
REQUESTS = {
    "zh": (
        ("请把{thing}交给{n}。", "我把{thing}交给{n}。"),
        ("请给{n}买{thing}。", "我给{n}买{thing}。"),
    ),
    "en": (
        ("Please give {thing} to {n}.", "I will give {thing} to {n}."),
        ("Please buy {thing} for {n}.", "I will buy {thing} for {n}."),
    ),
}
# What a courteous answer begins and ends with.
COURTESY = {"zh": ("你好！", "很高兴帮到你。"), "en": ("Hello! ", " I am happy to help you.")}
HELD_OUT = {"zh": 160, "en": 40}


def polite_request(rng: random.Random, world: World, language: str, held_out: bool = False) -> Exchange:
    """Draw a request and the plain answer to it. Who wants what is held out for one combination in eight."""
    while True:
        name, thing = rng.choice(world.known(language)).words[language]["n"], Thing.draw(rng)
        if reserved("favour", name, thing.named["zh"]) == held_out:
            break
    asked, done = rng.choice(REQUESTS[language])
    words = {"n": name, "thing": thing.named[language]}
    return Exchange("favour", language, asked.format_map(words), done.format_map(words))


def courteous(answer: str, language: str) -> str:
    """Return the same answer with courtesy."""
    opening, closing = COURTESY[language]
    return opening + answer + closing


def either_style(rng: random.Random, exchange: Exchange) -> Exchange:
    """Return the exchange with its answer in one of the two styles."""
    if rng.random() < 0.5:
        return exchange
    return exchange._replace(answer=courteous(exchange.answer, exchange.language))


def held_out_requests(world: World) -> list[dict[str, str]]:
    """Return 200 requests that no training text makes, in a fixed order, with the courteous answer and its two ends."""
    rng = random.Random(f"{world.seed}/favours")
    rows = []
    for language, count in HELD_OUT.items():
        drawn: dict[str, Exchange] = {}
        while len(drawn) < count:
            exchange = polite_request(rng, world, language, held_out=True)
            drawn[exchange.question] = exchange
        opening, closing = COURTESY[language]
        for i, exchange in enumerate(drawn.values(), start=1):
            row = {**exchange._asdict(), "answer": courteous(exchange.answer, language)}
            rows.append({"id": f"favour-{language}-{i:03d}", **row, "opening": opening, "closing": closing})
    return rows
