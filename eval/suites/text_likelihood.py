"""Bits per byte and perplexity of texts: how well a model predicts them, whatever its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import UserError
from eval.opened_model import OpenedModel
from eval.perplexity import read_blocks
from eval.suites.suite import Row, Score, rows_of, sources_of, spread
from text.sources.registry import Source
from text.tokenizer import characters

RESAMPLES = 1000
MOST_NATS = 700  # whose exponential a float still holds


class Document(NamedTuple):
    """A text and the source that it is scored with."""

    source: str
    text: str


@dataclass(kw_only=True)
class TextLikelihood:
    """Every token of every document scored once.

    Args:
        data: text files (.txt is one document), or .csv, .jsonl, .parquet with a document a row; several with commas.
        column: of the rows. split: of data on the Hub. window: most tokens a pass.
        stride: tokens that a further window scores; the rest of it is context, so that window - stride tokens or more
            stand before each. stride = window scores every window anew.
        start: what a document follows: eos, the end of another, as in pretraining, or bos.
        chunk: documents that are measured together.
    """

    data: str
    split: str = "test"
    column: str = "text"
    window: int = 1024
    stride: int = 512
    start: str = "eos"
    chunk: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window or self.chunk < 1:
            raise UserError(f"stride {self.stride}: must be from 1 to window = {self.window}")
        if self.start not in ("eos", "bos"):
            raise UserError(f"start {self.start!r}: one of eos, bos")

    def items(self, limit: int) -> list[Document]:
        found = []
        for source in sources_of(self.data, self.split, None):
            found += spread([Document(str(source), text) for text in self._texts(source)], limit)
        if not found:
            raise UserError(f"{self.data}: no text in it; give a file with text")
        return found

    def measure(self, model: OpenedModel, items: Sequence[Document], seed: int) -> list[Row]:
        start, window = [getattr(model, self.start)], min(self.window, model.context)
        rows, windows, of = [], [], []
        for number, document in enumerate(items):
            line = start + model.encode_bare(document.text)
            for first, scored, end in rolling(len(line), window, min(self.stride, window)):
                windows.append((line[first:end], scored - first))
                of.append(number)
            rows.append({"nats": 0.0, "tokens": len(line) - 1, "bytes": len(document.text.encode())})
        for number, nats in zip(of, model.window_nats(windows), strict=True):
            rows[number]["nats"] -= nats
        return rows

    def scores(self, items: Sequence[Document], rows: Sequence[Row]) -> list[Score]:
        groups: dict[str, list[Row]] = {}
        for document, row in zip(items, rows, strict=True):
            groups.setdefault(document.source, []).append(row)
        scores = _likelihoods("all", rows)
        if len(groups) > 1:
            for source, group in groups.items():
                scores += _likelihoods(source, group)
        return scores

    def _texts(self, source: Source) -> Iterator[str]:
        if source.path.lower().endswith(".txt"):
            text = "".join(read_blocks(Path(source.path)))
            if text:
                yield text
            return
        column = source.layout.columns.get("text", self.column)
        for place, row in rows_of(source):
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                shown = ", ".join(map(repr, row)) if isinstance(row, dict) else "none"
                raise UserError(f"{place}: no text in column {column!r}, the columns are {shown}; set column")
            if row[column]:
                yield characters(row[column])


def rolling(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first, scored, end) of the windows over a line of ids whose first is given: ids[scored:end] are scored in each.

    A window reads at most `window` ids. The last one reaches back as far as it can.
    """
    scored = 1
    while scored < length:
        end = min(scored + (window if scored == 1 else stride), length)
        yield max(end - window - 1, 0), scored, end
        scored = end


def _likelihoods(group: str, rows: Sequence[Row]) -> list[Score]:
    nats, tokens, size = (np.array([row[name] for row in rows], dtype=float) for name in ("nats", "tokens", "bytes"))
    bits = _interval(nats / math.log(2), size)
    low, high = (None if edge is None else math.exp(min(edge, MOST_NATS)) for edge in _interval(nats, tokens))
    perplexity = math.exp(min(nats.sum() / tokens.sum(), MOST_NATS))
    return [
        Score(group, "bits_per_byte", nats.sum() / math.log(2) / size.sum(), *bits, items=len(rows), share=False),
        Score(group, "perplexity", perplexity, low, high, items=len(rows), share=False),
    ]


def _interval(above: np.ndarray, below: np.ndarray) -> tuple[float | None, float | None]:
    """The 95% interval of a ratio of sums over documents, by the bootstrap; none of a single document."""
    if len(above) < 2:
        return None, None
    numbers, ratios = np.random.default_rng(0), []
    for _ in range(RESAMPLES):  # one after the other: together they would fill the memory for a large corpus
        drawn = numbers.integers(len(above), size=len(above))
        ratios.append(above[drawn].sum() / below[drawn].sum())
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)
