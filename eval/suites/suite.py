"""What a suite is: items, a measurement of each, and scores with their uncertainty. Suites are YAML files.

multiple_choice:
  data: data/ceval
  shots: 5
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from jsonargparse import ArgumentError, ArgumentParser

from cli import check_values
from errors import UserError
from eval.opened_model import OpenedModel
from text.files import read_yaml
from text.sources.registry import Source, find_sources
from text.sources.row_report import RowReport
from text.sources.rows import read_rows

BUILT_IN = Path(__file__).resolve().parents[2] / "configs" / "eval"
Row = dict[str, Any]
"""What was measured of one item; JSON."""


@dataclass(frozen=True)
class Score:
    """One number. `group`: of which items, "all" for the whole. `low`, `high`: its 95% interval, where there is one.

    `chance`: what guessing gives. `items`: how many it stands on. `share`: whether 0.5 means 50%.
    """

    group: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    items: int = 0
    share: bool = True


class Suite(Protocol):
    """Settings of one kind of suite are a dataclass with these methods.

    Attributes: chunk: items that are measured together and written down together.
    """

    data: str
    chunk: int

    def items(self, limit: int) -> list[Any]:
        """What to measure; with a limit, at most so many, evenly spread. Raises `UserError` for data it cannot use."""

    def measure(self, model: OpenedModel, items: Sequence[Any], seed: int) -> list[Row]:
        """One row for each item. seed: of the sampling, another one for each chunk."""

    def scores(self, items: Sequence[Any], rows: Sequence[Row]) -> list[Score]:
        """The whole first, then group by group."""


def open_suites(entries: str, kinds: dict[str, type]) -> dict[str, Suite]:
    """Suites by name, from entries of `open_suite` separated by commas; one on two sets of data is two suites.

    Raises `UserError` for an entry that is wrong, for none, and for one that is there twice.
    """
    suites: dict[str, Suite] = {}
    for entry in (part.strip() for part in entries.split(",")):
        if not entry:
            continue
        name, suite = open_suite(entry, kinds)
        if name in suites and suites[name].data != suite.data:
            name = f"{name}-{Path(suite.data).stem}"
        if name in suites:
            raise UserError(f"--suite {entry}: is named twice; leave one out")
        suites[name] = suite
    if not suites:
        raise UserError("--suite: names nothing; give a name or a .yaml file")
    return suites


def open_suite(entry: str, kinds: dict[str, type]) -> tuple[str, Suite]:
    """`NAME`, `FILE.yaml`, or either followed by `=DATA` for the same suite on other data, as (name, suite).

    Raises `UserError` for an unknown name or kind, and for a setting that is unknown or of another type.
    """
    name, _, data = entry.partition("=")
    file = Path(name)
    if file.suffix not in (".yaml", ".yml"):
        file = BUILT_IN / f"{name}.yaml"
        if not file.is_file():
            known = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}, or give a .yaml file"
            raise UserError(f"--suite {name}: no such suite; {hint}")
    kind, settings = _read(file)
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1)
        raise UserError(
            f"{file}: kind {kind!r}; " + (f"did you mean {near[0]}?" if near else f"one of {', '.join(kinds)}")
        )
    if data:
        settings["data"] = data
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kinds[kind])
    try:
        suite = kinds[kind](**vars(parser.instantiate(parser.parse_object(settings))))
        check_values(kinds[kind], vars(suite), "")
    # What the types of the parser cannot hold comes through it, such as 10**400 as a float.
    except (ArgumentError, UserError, ArithmeticError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from None
    return file.stem, suite


def _read(file: Path) -> tuple[str, dict[str, Any]]:
    content = read_yaml(file)
    if (
        not isinstance(content, dict)
        or len(content) != 1
        or not isinstance(settings := next(iter(content.values())), dict)
    ):
        raise UserError(f"{file}: must be one kind of suite with its settings, as in multiple_choice: {{data: DIR}}")
    return str(next(iter(content))), dict(settings)


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
