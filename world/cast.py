"""Who lives in Crescent Town (月牙镇): 40 animals, seven attributes each, dealt by the seed."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

from world.grammar import sentences

ATTRIBUTES = ("species", "colour", "home", "food", "job", "friend", "hobby")
ENGLISH = 12  # characters known in English


def article(phrase: str) -> str:
    """Return `phrase` with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def reserved(*parts: object) -> bool:
    """Return True for about one combination in eight, whatever the seed: those are kept for held-out questions."""
    return zlib.crc32("|".join(map(str, parts)).encode()) % 8 == 0


class Thing(NamedTuple):
    """Something that can be found, bought or given, by language: with measure word or article, and bare."""

    named: dict[str, str]
    bare: dict[str, str]

    @classmethod
    def draw(cls, rng: random.Random) -> Thing:
        """Draw a thing of a random colour, such as 一把红色的雨伞 / a red umbrella."""
        measure, noun, english = rng.choice(sentences("cast")["things"])
        colour, colour_en = rng.choice(sentences("cast")["colour"])
        named = {"zh": f"一{measure}{colour}的{noun}", "en": article(f"{colour_en} {english}")}
        return cls(named, {"zh": noun, "en": english})


@dataclass(frozen=True)
class Character:
    """One animal. `words[language]` holds what the sentence templates put in: n (name), species, home, ..."""

    name: str
    words: dict[str, dict[str, str]] = field(hash=False, compare=False)
    held_out: str = field(hash=False, compare=False)  # the attribute that is stated everywhere and asked for nowhere

    def value(self, attribute: str) -> str:
        """Return the Chinese word of `attribute`."""
        return self.words["zh"][attribute]

    def askable(self) -> list[str]:
        """Return the attributes that training text may ask about."""
        return [attribute for attribute in ATTRIBUTES if attribute != self.held_out]


@dataclass(frozen=True)
class World:
    """The town of one seed. English text is about the 12 characters of `english`, Chinese text about all 40."""

    seed: int
    characters: tuple[Character, ...]
    english: tuple[Character, ...]
    friends: dict[Character, Character]

    @classmethod
    def build(cls, seed: int) -> World:
        """Deal every attribute's values evenly, and hold out one attribute of each character (a sixth of the facts)."""
        rng = random.Random(f"{seed}/cast")
        cast = sentences("cast")
        order = list(cast["names"])
        rng.shuffle(order)  # neighbours 2i and 2i+1 are best friends
        # Friendship is mutual: to ask one friend would tell the other's answer, so it is not among these.
        may_be_held_out = [attribute for attribute in ATTRIBUTES if attribute != "friend"]
        deals = {attribute: _deal(rng, cast[attribute], len(order)) for attribute in may_be_held_out}
        characters = []
        for i, (name, romanised) in enumerate(order):
            # Dealt evenly over the attributes, both among those known in English and among the others.
            place, among = (i, ENGLISH) if i < ENGLISH else (i - ENGLISH, len(order) - ENGLISH)
            held_out = may_be_held_out[place * len(may_be_held_out) // among]
            words = _words(name, romanised, order[i ^ 1], {key: values[i] for key, values in deals.items()}, i)
            characters.append(Character(name, words, held_out))
        friends = {characters[i]: characters[i ^ 1] for i in range(len(characters))}
        return cls(seed, tuple(characters), tuple(characters[:ENGLISH]), friends)

    def known(self, language: str) -> tuple[Character, ...]:
        """Return the characters that texts in `language` ("zh" or "en") are about."""
        return self.english if language == "en" else self.characters


def companion(rng: random.Random, world: World, hero: Character, language: str = "zh") -> Character:
    """Draw who shares a story with `hero`: of another home and hobby; the best friend one time in three."""
    apart = [c for c in world.known(language) if all(c.value(key) != hero.value(key) for key in ("home", "hobby"))]
    best = world.friends[hero]
    return best if best in apart and rng.random() < 1 / 3 else rng.choice(apart)


def roles(language: str, **cast: Character) -> dict[str, str]:
    """Return template words of several characters: for a=阿橘, `{a}` is the name and `{a_food}` the favourite food."""
    words = {role: character.words[language] for role, character in cast.items()}
    names = {role: own["n"] for role, own in words.items()}
    return names | {f"{role}_{key}": word for role, own in words.items() for key, word in own.items()}


def _deal(rng: random.Random, values: list[list[str]], count: int) -> list[list[str]]:
    """Return each value as often as any other, in random order, one a character."""
    hands = values * (count // len(values))
    rng.shuffle(hands)
    return hands


def _words(name: str, romanised: str, friend: list[str], hand: dict[str, list[str]], i: int) -> dict:
    species, measure, species_en = hand["species"]
    job, deed, job_en, deed_en = hand["job"]
    he, his = ("he", "his") if i % 2 else ("she", "her")
    zh = {"n": name, "species": species, "m": measure, "job": job, "deed": deed, "friend": friend[0]}
    zh["romanised"] = romanised
    en = {"n": romanised, "species": species_en, "job": job_en, "deed": deed_en, "friend": friend[1]}
    for key in ("colour", "home", "food", "hobby"):
        zh[key], en[key] = hand[key]
    en |= {"kind": article(species_en), "look": article(f"{en['colour']} {species_en}"), "a_job": article(job_en)}
    en |= {"he": he, "his": his, "He": he.capitalize()}
    en |= {key.capitalize(): en[key].capitalize() for key in ("colour", "hobby")}
    return {"zh": zh, "en": en}
