"""What a source holds, all of it read: rows, lengths in tokens, what a sequence length would cut, problems by kind."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from errors import UserError
from text.chats.encoded import fit
from text.inspection import encode_items, kind_of_source, lengths, no_usable, placed_items, trained
from text.sources.registry import Source
from text.sources.row_report import RowReport, balance
from text.tokenizer import Tokenizer

ROWS_AT_ONCE = 1000
NOUNS = {"text": "documents", "chat": "conversations", "preference": "pairs", "prompt": "prompts"}


@dataclass
class Findings:
    """What was found. `sizes`: positions that each conversation, side of a pair, prompt or document fills.

    `whole`, `cut` and `dropped`: what became of the usable rows; `longer`: those that do not fit, which text survives.
    """

    kind: str
    report: RowReport = field(default_factory=RowReport)
    sizes: list[int] = field(default_factory=list)
    trained: int = 0
    whole: int = 0
    longer: int = 0
    cut: int = 0
    dropped: int = 0
    trouble: str = ""

    def lines(self, sequence_length: int) -> list[str]:
        """Return the findings for people."""
        lines = self.report.lines()
        if self.sizes:
            middle, high = np.percentile(self.sizes, (50, 90), method="higher")
            tokens = sum(self.sizes) + len(self.sizes)
            lines.append(f"{tokens:,} tokens, {self.trained:,} of them trained on")
            lines.append(
                f"tokens of one: median {middle + 1:,}, 90 % up to {high + 1:,}, longest {max(self.sizes) + 1:,}"
            )
            lines.append(f"sequence_length {sequence_length}: {self._fate()}")
            unread = self.report.kept - self.whole - self.cut - self.dropped  # where a file breaks off
            unused = self.report.unused_by_kind if self.kind == "text" else self.report.unused
            fates = {NOUNS[self.kind]: self.whole, "cut": self.cut, "dropped": self.dropped, "not looked at": unread}
            lines.append(balance(self.report.rows, "rows", {**fates, **unused}))
        return lines

    def _fate(self) -> str:
        if self.kind == "text":
            return f"{self.longer:,} documents are longer and continue in the next row; nothing is lost"
        if not self.cut and not self.dropped:
            return f"all {NOUNS[self.kind]} fit"
        cut = f"{self.cut:,} cut after the last answer that fits, " if self.kind == "chat" else ""
        return f"{cut}{self.dropped:,} of {self.report.kept:,} {NOUNS[self.kind]} left out"


def check_source(source: Source, tokenizer: Tokenizer, sequence_length: int) -> Findings:
    """Read and encode everything; in memory is no more than the lengths."""
    found = Findings(kind_of_source(source))
    items = (item for _, item in placed_items(source, found.kind, found.report))
    some: list[Any] = []
    try:
        for item in tqdm(items, f"reading {source}", leave=False, disable=not sys.stderr.isatty()):
            some.append(item)
            if len(some) == ROWS_AT_ONCE:
                _look(found, tokenizer, some, sequence_length)
                some = []
    except UserError as error:  # a file that breaks off: what was found before it is worth seeing
        found.trouble = str(error)
    _look(found, tokenizer, some, sequence_length)
    if not found.sizes and not found.trouble:
        found.trouble = str(no_usable(source, found.report))
    return found


def _look(found: Findings, tokenizer: Tokenizer, items: list[Any], sequence_length: int) -> None:
    """Count some rows, as the stage that reads them does."""
    for sequences in encode_items(tokenizer, found.kind, items):
        sizes = lengths(sequences)
        found.sizes += sizes
        found.trained += trained(sequences)
        is_longer = max(sizes) > sequence_length
        found.longer += is_longer
        fate = "dropped" if is_longer and found.kind != "text" else "whole"
        if found.kind == "chat":
            _, lost = fit(sequences[0][1], sequence_length)
            fate = lost if lost in ("cut", "dropped") else "whole"
        setattr(found, fate, getattr(found, fate) + 1)
