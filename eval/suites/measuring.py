"""A suite measured on a model, chunk by chunk."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from errors import one_line
from eval.opened_model import OpenedModel
from eval.suites.measured_rows import MeasuredRows
from eval.suites.suite import Score, Suite


@dataclass(frozen=True)
class Measured:
    """A suite's scores. `seconds`: of this sitting; `cut`: questions whose beginning had no room in the context.

    `content`: what tells the items from others (`fingerprint`); empty in older files.
    """

    name: str
    settings: dict[str, Any]
    scores: list[Score]
    items: int
    cut: int
    seconds: float
    content: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "scores": [asdict(score) for score in self.scores]}


def fingerprint(items: Sequence[Any]) -> str:
    """16 hex digits of what the items say: rows of a file that was changed since are of no use."""
    said = hashlib.sha256()
    for item in items:
        said.update(re.sub(r" at 0x[0-9a-f]+>", ">", repr(item)).encode("utf8", "backslashreplace"))  # of functions
    return said.hexdigest()[:16]


def measure(
    name: str, suite: Suite, items: Sequence[Any], model: OpenedModel, weights: dict[str, Any], out: Path
) -> Measured:
    """Measure of the suite's items what `out`/NAME.jsonl does not hold yet, and score all of them.

    weights: what tells this model from others: its path, sizes and times of its files, its number type.
    """
    settings = {"kind": type(suite).__name__, **asdict(suite)}
    facts = {"model": weights, "suite": settings, "items": len(items), "content": (content := fingerprint(items))}
    start = time.perf_counter()
    with MeasuredRows(out / f"{name}.jsonl", facts, suite.chunk) as measured:
        if measured.started_anew:
            tqdm.write(measured.started_anew)
        done = len(measured.rows)
        with tqdm(total=len(items), initial=done, desc=name, unit="item", disable=None) as bar:
            for first in range(done, len(items), suite.chunk):
                part = items[first : first + suite.chunk]
                measured.add(suite.measure(model, part, seed=first))
                bar.update(len(part))
        cut = sum(bool(row.get("cut")) for row in measured.rows)
        scores = [replace(score, group=one_line(score.group)) for score in suite.scores(items, measured.rows)]
    return Measured(name, settings, scores, len(items), cut, time.perf_counter() - start, content)
