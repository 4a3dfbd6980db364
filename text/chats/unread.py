"""Text in a row that no reader takes: it may be speech that should be trained on, so a report names it.

A field counts as such when, however deep in it, there is a text that
- has at least four words, or eight Chinese or Japanese characters: ids, links, names and categories have fewer;
- is not part of what was read, and does not repeat all of it, as a column with the whole formatted prompt does;
and when its name does not say that it describes the row: the last word of `prompt_id`, `data_source`, `chosenModel` or
`meta` is one of `DESCRIBING`. Numbers, flags and empty fields are never speech.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from text.chats.literals import parse_list
from text.sources.row_report import RowError

LEAST_WORDS, LEAST_CHARACTERS, DEEPEST = 4, 8, 16
DESCRIBING = {
    "id", "ids", "uuid", "hash", "key", "index", "source", "sources", "origin", "dataset", "datasets", "provenance",
    "url", "urls", "link", "links", "path", "file", "filename", "category", "categories", "subcategory", "class",
    "cluster", "topic", "topics", "subject", "domain", "domains", "field", "type", "kind", "tag", "tags", "label",
    "labels", "keyword", "keywords", "name", "names", "title", "author", "license", "language", "lang", "locale",
    "split", "version", "format", "model", "models", "generator", "annotator", "score", "scores", "rating", "ratings",
    "quality", "difficulty", "ability", "skill", "skills", "metric", "metrics", "reward", "rewards", "weight",
    "length", "count", "tokens", "date", "time", "timestamp", "created", "updated", "meta", "metadata", "info",
    "image", "images", "audio", "audios", "video", "videos",
}  # fmt: skip
_NAME_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_CHARACTER = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")


def unread(fields: Mapping[str, object], said: Sequence[str]) -> list[str]:
    """Return the names of the fields that hold such text. said: the texts that were read."""
    spoken = {name: value for name, value in fields.items() if value and isinstance(value, str | list | tuple | dict)}
    everything = "\0".join(said) if spoken else ""
    return [name for name in spoken if any(_is_new(text, said, everything) for text in _texts(name, spoken[name]))]


def _is_new(text: str, said: Sequence[str], everything: str) -> bool:
    text = text.strip()
    is_speech = len(text.split(None, LEAST_WORDS)) >= LEAST_WORDS or len(_CHARACTER.findall(text)) >= LEAST_CHARACTERS
    return is_speech and text not in everything and not (said and all(part.strip() in text for part in said))


def _texts(name: object, value: object, depth: int = 0) -> Iterator[str]:
    """Yield all texts in a value, also in lists that a cell spells, without those in fields that describe."""
    words = _NAME_WORDS.findall(name) if isinstance(name, str) else []
    if depth > DEEPEST or (words and words[-1].lower() in DESCRIBING):
        return
    if isinstance(value, str):
        try:
            spelled = parse_list(value, "") if value.startswith(("[", "{")) else value
        except RowError:
            spelled = value
        if isinstance(spelled, list | dict):
            yield from _texts("", spelled, depth + 1)
        else:
            yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key, inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts("", inner, depth + 1)
