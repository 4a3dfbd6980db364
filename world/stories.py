"""Short stories of Crescent Town, told by the plots of stories.yaml."""

from __future__ import annotations

import random

from world.cast import Character, Thing, World, companion, roles
from world.facts import statement
from world.grammar import joined, sentences

# What an aside may be about, where the story does not tell it anyway, and how many there may be.
ASIDES = ("colour", "food", "job", "hobby")
COUNTS = {"zh": (0, 1, 1, 2), "en": (0, 1, 1)}


def tell(rng: random.Random, world: World, hero: Character, other: Character, language: str, asides: int = 0) -> str:
    """Return a story about `hero` and `other` (see `companion`), with `asides` extra facts about the hero."""
    grammar, best = sentences("stories")[language], world.friends[hero]
    plot = rng.choice([plot for plot in grammar["plots"] if other is best or "friend" not in plot])
    third = rng.choice([c for c in world.known(language) if c not in (hero, other, best)])
    thing = Thing.draw(rng)
    place, place2 = (names[language == "en"] for names in rng.sample(sentences("cast")["places"], 2))
    words = roles(language, a=hero, b=other, c=third)
    words |= {"place": place, "place2": place2, "when": rng.choice(grammar["when"])}
    words |= {"thing": thing.named[language], "bare": thing.bare[language]}
    opening, *rest = [rng.choice(some) for some in (grammar["openings"], *plot["beats"], grammar["endings"])]
    fresh = [about for about in ASIDES if f"a_{about}" not in opening + "".join(rest)]
    told = [statement(rng, hero, about, language) for about in rng.sample(fresh, min(asides, len(fresh)))]
    title = f"《{rng.choice(plot['titles'])}》" if "titles" in plot and rng.random() < 0.2 else ""
    return joined(list(filter(None, [title, opening, *told, *rest])), language).format_map(words)


def story(rng: random.Random, world: World, language: str) -> str:
    """Return a story about anybody who is known in `language`."""
    hero = rng.choice(world.known(language))
    return tell(rng, world, hero, companion(rng, world, hero, language), language, rng.choice(COUNTS[language]))
