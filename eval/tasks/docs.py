"""The items of a task as lm-evaluation-harness takes them, and the rows that they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from text.chats.chat_template import Message
from text.sources.registry import Source, find_sources
from text.tokenizer import characters


class Docs(list[dict[str, Any]]):
    """A list with what lm-evaluation-harness asks of a data set; its texts can be written as UTF-8."""

    def __init__(self, docs: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(map(_whole, docs))

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0] if self else ())


def _whole(value: Any) -> Any:
    """Return the value with `characters` of every text in it."""
    if isinstance(value, dict):
        return {name: _whole(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return list(map(_whole, value))
    return characters(value) if isinstance(value, str) else value


def sources_of(data: str, split: str, kind: str | None) -> list[Source]:
    """Return the places of `data`; `split` is that of the Hub and of folders, where training takes another."""
    return [
        replace(source, split=split) if source.is_hub or Path(source.path).is_dir() else source
        for source in find_sources(data, kind=kind)
    ]


def evenly_spaced(items: list[Any], limit: int) -> list[Any]:
    """Return at most `limit` of the items, evenly spaced; 0 takes all."""
    count = min(limit or len(items), len(items))
    return [items[number * len(items) // count] for number in range(count)]


def as_turns(pairs: Sequence[tuple[str, str]], system: str = "") -> list[Message]:
    """Return a conversation of questions and answers; an empty answer is the one that is asked for."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, answer in pairs:
        messages.append({"role": "user", "content": question})
        messages += [{"role": "assistant", "content": answer}] if answer else []
    return messages
