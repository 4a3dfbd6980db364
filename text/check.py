"""What a source holds, all of it read: rows, lengths in tokens, what a sequence length would cut, problems by kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from rich.console import Console
from rich.progress import Progress

from errors import UserError
from text.inspection import encode_items, kind_of_source, learnt, lengths, no_usable, placed_items
from text.packing import cut_at_turn
from text.registry import Source
from text.row_report import RowReport
from text.tokenizer import Tokenizer

ROWS_AT_ONCE = 1000
NOUNS = {"text": "documents", "chat": "conversations", "preference": "pairs", "prompt": "prompts"}


@dataclass
class Findings:
    """What was found. `sizes`: positions that each conversation, side of a pair, prompt or document fills."""

    kind: str
    report: RowReport = field(default_factory=RowReport)
    sizes: list[int] = field(default_factory=list)
    learnt: int = 0
    cut: int = 0
    dropped: int = 0
    trouble: str = ""

    def lines(self, sequence_length: int) -> list[str]:
        """For people."""
        lines = self.report.lines()
        if self.sizes:
            middle, high = np.percentile(self.sizes, (50, 90), method="higher")
            tokens = sum(self.sizes) + len(self.sizes)
            lines.append(f"{tokens:,} tokens, {self.learnt:,} of them learnt")
            lines.append(
                f"tokens of one: median {middle + 1:,}, 90 % up to {high + 1:,}, longest {max(self.sizes) + 1:,}"
            )
            lines.append(f"sequence_length {sequence_length}: {self._fate()}")
        return lines

    def _fate(self) -> str:
        if self.kind == "text":
            return f"{self.cut:,} documents are longer and go on in the next row; nothing is lost"
        if not self.cut and not self.dropped:
            return f"all {NOUNS[self.kind]} fit"
        cut = f"{self.cut:,} cut after the last answer that fits, " if self.kind == "chat" else ""
        return f"{cut}{self.dropped:,} of {self.report.kept:,} {NOUNS[self.kind]} left out"


def check_source(source: Source, tokenizer: Tokenizer, sequence_length: int) -> Findings:
    """Read and encode everything; in memory is no more than the lengths."""
    found = Findings(kind_of_source(source))
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"reading {source}", total=None)
        items = (item for _, item in placed_items(source, found.kind, found.report))
        try:
            while some := list(islice(items, ROWS_AT_ONCE)):
                for sequences in encode_items(tokenizer, found.kind, some):
                    sizes = lengths(sequences)
                    found.sizes += sizes
                    found.learnt += learnt(sequences)
                    _judge(found, sequences, max(sizes), sequence_length)
                bar.update(task, advance=len(some))
        except UserError as error:  # a file that breaks off: what was found before it is worth seeing
            found.trouble = str(error)
    if not found.sizes and not found.trouble:
        found.trouble = str(no_usable(source, found.report))
    return found


def _judge(found: Findings, sequences: list, longest: int, sequence_length: int) -> None:
    if longest <= sequence_length:
        return
    if found.kind == "text" or (found.kind == "chat" and cut_at_turn(sequences[0][1], sequence_length)):
        found.cut += 1
    else:
        found.dropped += 1
