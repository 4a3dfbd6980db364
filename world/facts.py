"""Every way to state a fact about a character or to ask for it, in both languages, and encyclopaedia entries."""

from __future__ import annotations

import random
from typing import NamedTuple

from world.cast import ATTRIBUTES, Character, World
from world.grammar import joined, sentences


class Exchange(NamedTuple):
    """A question with its one right answer. `kind` is the skill it asks for; `language` is "zh" or "en"."""

    kind: str
    language: str
    question: str
    answer: str


def exchange(kind: str, language: str, **words: object) -> Exchange:
    """Return the question and answer that skills.yaml has of a kind, with the words in them."""
    form = sentences("skills")[language][kind]
    return Exchange(kind, language, form["question"].format_map(words), form["answer"].format_map(words))


def statement(rng: random.Random, character: Character, attribute: str, language: str) -> str:
    """Return one sentence that states the fact: half of the time the canonical one, else a paraphrase."""
    canonical, *others = sentences("facts")["statements"][language][attribute]
    return (canonical if rng.random() < 0.5 else rng.choice(others)).format_map(character.words[language])


def canonical_statement(character: Character, attribute: str, language: str) -> str:
    """Return the sentence that answers every question about the fact."""
    return sentences("facts")["statements"][language][attribute][0].format_map(character.words[language])


def mixed_statement(rng: random.Random, character: Character, language: str) -> str:
    """Return one sentence that states two or three facts."""
    return rng.choice(sentences("facts")["mixed"][language]).format_map(character.words[language])


def clauses_zh(character: Character, attributes: list[str]) -> str:
    """Return the facts as one comma-joined predicate that can follow a name or 它, without the full stop."""
    in_order = sorted(attributes, key=ATTRIBUTES.index)
    clauses = sentences("facts")["clauses"]["zh"]
    text = "，".join(clauses[attribute].format_map(character.words["zh"]) for attribute in in_order)
    return f"的{text}" if in_order[0] == "hobby" else text


def fact_questions(character: Character, attribute: str, language: str) -> list[Exchange]:
    """Return the fact's question in every wording, each with the canonical answer."""
    words, asked = character.words[language], sentences("facts")["questions"][language][attribute]
    answer = canonical_statement(character, attribute, language)
    return [Exchange("fact", language, question.format_map(words), answer) for question in asked]


def introduction(character: Character, language: str) -> str:
    """Return a fixed short portrait for chats. It leaves the held-out attributes out."""
    attributes = character.askable()
    if language == "zh":
        return f"{character.name}{clauses_zh(character, attributes[:3])}。它{clauses_zh(character, attributes[3:])}。"
    return " ".join(canonical_statement(character, attribute, "en") for attribute in attributes[:4])


def entry(rng: random.Random, world: World, language: str) -> str:
    """Return an encyclopaedia entry: most of a character's facts, in random order and wording."""
    character = rng.choice(world.known(language))
    attributes = rng.sample(ATTRIBUTES, rng.randint(4, len(ATTRIBUTES)))
    head = rng.choice(sentences("facts")["heads"][language]).format_map(character.words[language])
    if language == "zh" and rng.random() < 0.15:
        first, rest = (clauses_zh(character, part) for part in (attributes[:3], attributes[3:]))
        return f"{head}{character.name}{first}。它{rest}。"
    stated = [statement(rng, character, attribute, language) for attribute in attributes]
    if rng.random() < 0.5:
        stated.insert(rng.randrange(len(stated)), mixed_statement(rng, character, language))
    for i in range(1, len(stated)):
        if rng.random() < 0.3:
            stated[i] = _with_pronoun(stated[i], character, language)
    if rng.random() < 0.4:
        return "\n".join([head.strip(), *stated]).strip()
    return head + joined(stated, language)


def roll_call(rng: random.Random, world: World, language: str) -> str:
    """Return facts seen from the value's side: who lives by the river, who likes corn best."""
    stated, forms = [], sentences("facts")["roll_calls"][language]
    for attribute in rng.sample([a for a in ATTRIBUTES if a != "friend"], rng.randint(3, 4)):
        words = rng.choice(world.known(language)).words[language]
        known = [character.words[language] for character in world.known(language)]
        names = [own["n"] for own in known if own[attribute] == words[attribute]]
        rng.shuffle(names)
        template = forms[attribute][-1 if len(names) > 1 else 0]
        stated.append(template.format(names=_listed(names, language), **words))
    return joined(stated, language)


def _listed(names: list[str], language: str) -> str:
    comma, last = ("、", "和") if language == "zh" else (", ", " and ")
    return last.join([comma.join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _with_pronoun(sentence: str, character: Character, language: str) -> str:
    """Return the sentence with the name at its start turned into 它, he, she, his or her."""
    words = character.words[language]
    name = words["n"]
    if language == "zh":
        return "它" + sentence[len(name) :] if sentence.startswith(name) else sentence
    if sentence.startswith(f"{name}'s "):
        return words["his"].capitalize() + sentence[len(name) + 2 :]
    alone = sentence.startswith(f"{name} ") and f"{name} and {words['friend']}" not in sentence
    return words["He"] + sentence[len(name) :] if alone else sentence
