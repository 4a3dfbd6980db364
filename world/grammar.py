"""How the town's texts are written down: tables of words, sentences with alternatives, and plots made of these."""

from __future__ import annotations

from dataclasses import dataclass


def table(text: str) -> tuple[tuple[str, ...], ...]:
    """Return the rows of `text`, separated by commas, each as its columns, separated by slashes."""
    return tuple(tuple(row.strip().split("/")) for row in text.split(","))


def wordings(text: str) -> tuple[str, ...]:
    """Return the alternatives of `text`, separated by `|`; an empty one says nothing."""
    return tuple(text.split("|"))


def joined(sentences: list[str], language: str) -> str:
    """Return sentences as one text, with spaces between them in English."""
    return ("" if language == "zh" else " ").join(sentences)


@dataclass(frozen=True)
class Plot:
    """What happens: beats separated by `/`, each with its `wordings`. titles: `wordings` too, in Chinese.

    `a` is the hero, `c` a third character; `b` is the hero's best friend where `friend` says so, anybody otherwise.
    """

    beats: str
    titles: str = ""
    friend: bool = False


@dataclass(frozen=True)
class Grammar:
    """The stories of a language: when they happen, how they begin and end, and what happens between."""

    when: tuple[str, ...]
    openings: tuple[str, ...]
    endings: tuple[str, ...]
    plots: tuple[Plot, ...]
