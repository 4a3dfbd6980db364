"""Filling in the middle (DeepSeek-V3 section 4.1): gaps of held-out documents, filled to the letter.

python -m world.gaps --out data/demo
python eval/infilling.py --ckpt out/pretrain/final --file data/demo/gaps.jsonl

Each gap is filled twice: with what follows it, as a model that was pretrained with --fim_rate has learned, and from
what comes before it alone, as any model can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cli import call
from errors import command_line, require, tracked
from eval.answering import Answerer
from eval.likelihood import CacheScorer
from eval.questions import read_lines
from eval.scores import wilson
from text.corpus.infilling import question
from text.files import json_text

MORE = 8  # tokens that an answer may be longer than the longest middle: to see that it does not end


@dataclass(frozen=True)
class Gap:
    """A document in three parts, and the kind that scores are grouped by."""

    prefix: str
    middle: str
    suffix: str
    kind: str


@dataclass(frozen=True)
class Filled:
    """What a model wrote with the suffix and without it, and the bits of the middle and its end, with the suffix."""

    gap: Gap
    written: str
    before: bool
    bits: float

    @property
    def exact(self) -> bool:
        return self.written == self.gap.middle


def read_gaps(path: Path) -> list[Gap]:
    """Read JSON lines with prefix, middle, suffix and optionally kind. Raises `UserError` for another row."""

    def make(row: Any) -> Gap:
        parts = row["prefix"], row["middle"], row["suffix"], row.get("kind", "all")
        require(all(isinstance(part, str) for part in parts) and parts[1] != "", f"{path}: a gap without a middle")
        return Gap(*parts)

    return read_lines(path, make, "prefix, middle and suffix")


def fill(answerer: Answerer, gaps: Sequence[Gap]) -> list[Filled]:
    """Fill each gap greedily. Raises `UserError` where a document is longer than the model reads."""
    tokenizer = answerer.tokenizer
    parts = [[tokenizer.encode(part) for part in (gap.prefix, gap.suffix, gap.middle)] for gap in gaps]
    asked = [question(tokenizer, prefix, suffix) for prefix, suffix, _ in parts]
    middles = [[*middle, tokenizer.eos_id] for *_, middle in parts]
    longest = max(map(len, middles)) + MORE
    limit = answerer.model.config.max_position_embeddings
    require(
        max(map(len, asked)) + longest <= limit, f"a document is longer than the {limit} tokens that the model reads"
    )
    written = list(tracked(answerer.completions(asked, longest), "filling", len(gaps)))
    cuts = [_cut(answerer, gap) for gap in gaps]
    forward = tracked(answerer.completions([ids for ids, _ in cuts], longest), "continuing", len(gaps))
    before = [text.startswith(expected) for text, (_, expected) in zip(forward, cuts, strict=True)]
    scores = dict(CacheScorer(answerer).score_pairs(list(zip(asked, middles, strict=True))))
    nats = [-scores[place][0] for place in range(len(gaps))]
    return [
        Filled(gap, text, right, value / math.log(2))
        for gap, text, right, value in zip(gaps, written, before, nats, strict=True)
    ]


def _cut(answerer: Answerer, gap: Gap) -> tuple[list[int], str]:
    """Return what comes before a gap, as tokens of the whole document, and what its continuation must begin with.

    A token that reaches into the gap belongs to the continuation. The character after the gap shows that it ends there.
    """
    tokenizer = answerer.tokenizer
    encoding = tokenizer.raw.encode(gap.prefix + gap.middle + gap.suffix, add_special_tokens=False)
    count = next(number for number, (_, end) in enumerate(encoding.offsets) if end > len(gap.prefix))
    begin = encoding.offsets[count][0]
    expected = gap.prefix[begin:] + gap.middle + gap.suffix[:1]
    return [tokenizer.eos_id, *encoding.ids[:count]], expected


def scores(filled: Sequence[Filled]) -> dict[str, dict[str, float]]:
    """Return by kind, and for all: gaps, shares filled exactly with the suffix and without it, bits of a middle."""
    kinds = [*sorted({one.gap.kind for one in filled}), "all"]
    found = {}
    for kind in kinds:
        own = [one for one in filled if kind in (one.gap.kind, "all")]
        exact, before = (sum(values) / len(own) for values in ([o.exact for o in own], [o.before for o in own]))
        found[kind] = {"gaps": len(own), "exact": exact, "before": before, "bits": sum(o.bits for o in own) / len(own)}
    return found


def infilling(
    ckpt: str, file: str, json: bool = False, show: int = 5, device: str = "auto", dtype: str = "auto"
) -> None:
    """Print the share of gaps filled to the letter.

    Args:
        ckpt: checkpoint folder
        file: JSONL with prefix, middle, suffix and kind
        json: print one JSON object instead of a table
        show: gaps filled wrongly to show
        device: auto, cpu or cuda
        dtype: auto, bf16 or fp32
    """
    gaps = read_gaps(Path(file))
    filled = fill(Answerer.open(ckpt, device, dtype), gaps)
    found = scores(filled)
    if json:
        print(json_text({"scores": found, "gaps": [asdict(one) | {"exact": one.exact} for one in filled]}))
        return
    table, console = Table("kind", "gaps", "filled exactly", "95%", "from before alone", "bits of a middle"), Console()
    for kind, row in found.items():
        low, high = wilson(row["exact"], int(row["gaps"]))
        spread = f"{low:.0%} - {high:.0%}"
        table.add_row(
            kind, f"{row['gaps']:.0f}", f"{row['exact']:.1%}", spread, f"{row['before']:.1%}", f"{row['bits']:.2f}"
        )
    console.print(table)
    for one in [one for one in filled if not one.exact][:show]:
        console.print(f"{one.gap.prefix}[{one.gap.middle}]{one.gap.suffix}\n  filled {one.written}", markup=False)


if __name__ == "__main__":
    command_line(lambda: call(infilling, __doc__ or ""))
