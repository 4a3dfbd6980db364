"""Old poems and nursery rhymes that the town recites: words that no template would ever use."""

from __future__ import annotations

import random

from world.cast import World
from world.grammar import sentences


def recital(rng: random.Random, world: World, language: str) -> str:
    """Return a text in which somebody says a poem or a rhyme."""
    name = rng.choice(world.known(language)).words[language]["n"]
    place, place_en = rng.choice(sentences("cast")["places"])
    if language == "en":
        title, text = rng.choice(sentences("verses")["rhymes"])
        return f"In {place_en}, {name} said the rhyme {title}. {text}"
    title, poet, text = rng.choice(sentences("verses")["poems"])
    return f"{name}在{place}背了{poet}的《{title}》：\n{text}"


def recitation(rng: random.Random, language: str) -> tuple[str, str]:
    """Return a request for a poem or a rhyme, and its text."""
    if language == "en":
        title, text = rng.choice(sentences("verses")["rhymes"])
        return f"Please say the rhyme {title}.", text
    title, _, text = rng.choice(sentences("verses")["poems"])
    return f"请背一背《{title}》。", text
