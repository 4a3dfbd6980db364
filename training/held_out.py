"""What is held out, under a name that tells whether two runs were measured on the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from text.sources.registry import Source
from text.tokenizer import SPECIAL_TOKENS, Tokenizer, characters
from training.losses import IGNORE, Batch

if TYPE_CHECKING:
    from text.chats.problems import Problem

MOST_FILES = 3  # whose names are part of the name
# What each measure of held-out data is measured on: a name of an entry's `held_out`.
MEASURED_ON = {
    "val_bits_per_byte": "text",
    "val_preferred": "pairs",
    "val_margin": "pairs",
    "val_accuracy": "problems",
    "val_pass_1": "problems",
}


def labels_name(sources: Sequence[Source | str | Path], batches: Iterable[Batch], tokenizer: Tokenizer) -> str:
    """`book.csv 5f2c81d09a7be346`: the files and 16 hex digits of the text that the labels of the batches stand for.

    Tokenizer, length and order of the rows do not enter: labels are joined and cut where documents or turns end.
    """
    ids = [label for batch in batches for label in batch["labels"].flatten().tolist() if label != IGNORE]
    parts, begin = [], 0
    for place, token in enumerate([*ids, 0]):
        if token < len(SPECIAL_TOKENS):
            parts.append(tokenizer.decode(ids[begin:place]))
            begin = place + 1
    return _name(sources, parts)


def problems_name(sources: Sequence[Source | str | Path], problems: Iterable[Problem]) -> str:
    """The same of problems: of their questions and answers."""
    return _name(sources, (f"{problem.question}\0{problem.answer}" for problem in problems))


def _name(sources: Sequence[Source | str | Path], parts: Iterable[str]) -> str:
    digest = xxhash.xxh3_64()
    for part in sorted(set(parts) - {""}):
        digest.update(characters(part).encode() + b"\0")
    files = [_file_name(source) for source in sources]
    more = [f"and {len(files) - MOST_FILES} more"] if len(files) > MOST_FILES else []
    return f"{', '.join([*files[:MOST_FILES], *more])} {digest.hexdigest()}"


def _file_name(source: Source | str | Path) -> str:
    is_elsewhere = isinstance(source, Source) and (source.name or source.is_hub)
    return str(source) if is_elsewhere else Path(str(source)).name


def is_named(names: Any) -> bool:
    """Whether this is what an entry has as `held_out`."""
    return isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
