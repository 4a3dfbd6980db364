"""Texts to be predicted: bits per byte and perplexity, whatever the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError
from eval.perplexity import read_blocks
from eval.tasks.docs import Docs, evenly_spaced, sources_of
from text.sources.registry import Source
from text.sources.rows import every_row
from text.tokenizer import characters


@dataclass(kw_only=True)
class Text:
    """Every token of every document scored once.

    Args:
        data: text files (.txt is one document), or .csv, .jsonl, .parquet with a document a row; several with commas.
        column: of the rows. split: of data on the Hub. window: most tokens a pass.
        stride: tokens that a further window scores; the rest of it is context, so that window - stride tokens or more
            stand before each. stride = window scores disjoint windows, as lm-evaluation-harness does.
        start: what a document follows: eos, the end of another, as in pretraining, or bos.
    """

    data: str
    split: str = "test"
    column: str = "text"
    window: int = 1024
    stride: int = 512
    start: str = "eos"

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window:
            raise UserError(f"stride {self.stride}: must be from 1 to window = {self.window}")
        if self.start not in ("eos", "bos"):
            raise UserError(f"start {self.start!r}: one of eos, bos")

    def docs(self, limit: int = 0) -> Docs:
        """Return the documents; with a limit, so many of each source."""
        found = [(source, list(self._texts(source))) for source in sources_of(self.data, self.split, None)]
        docs = Docs({"group": str(source), "text": text} for source, own in found for text in evenly_spaced(own, limit))
        if not docs:
            raise UserError(f"{self.data}: no text in it; give a file with text")
        return docs

    def keys(self) -> dict[str, Any]:
        return {}

    def _texts(self, source: Source) -> Iterator[str]:
        if source.path.lower().endswith(".txt"):
            yield from filter(None, ["".join(read_blocks(Path(source.path)))])
            return
        column = source.layout.columns.get("text", self.column)
        for place, row in every_row(source):
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                shown = ", ".join(map(repr, row)) if isinstance(row, dict) else "none"
                raise UserError(f"{place}: no text in column {column!r}, the columns are {shown}; set column")
            if row[column]:
                yield characters(row[column])
