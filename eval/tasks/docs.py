"""The items of a task as lm-evaluation-harness takes them, and the rows that they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from text.sources.registry import Source, find_sources
from text.sources.row_report import RowReport
from text.sources.rows import read_rows
from text.tokenizer import characters


class Docs(list[dict[str, Any]]):
    """A list with what lm-evaluation-harness asks of a data set; its texts can be written as UTF-8."""

    def __init__(self, docs: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(map(_whole, docs))

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0] if self else ())


def _whole(value: Any) -> Any:
    """The value with `characters` of every text in it."""
    if isinstance(value, dict):
        return {name: _whole(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return characters(value) if isinstance(value, str) else value


def sources_of(data: str, split: str, kind: str | None) -> list[Source]:
    """The places of `data`; `split` is that of the Hub and of folders, where training takes another."""
    return [
        replace(source, split=split) if source.is_hub or Path(source.path).is_dir() else source
        for source in find_sources(data, kind=kind)
    ]


def rows_of(source: Source) -> Iterator[tuple[str, object]]:
    """(place, row) of each row of a source. Raises `UserError` for a file or a row that cannot be read."""
    yield from read_rows(source, "stop", RowReport())


def spread(items: list[Any], limit: int) -> list[Any]:
    """At most `limit` of the items, evenly spread; 0 keeps all."""
    if not limit or len(items) <= limit:
        return items
    return [items[number * len(items) // limit] for number in range(limit)]
