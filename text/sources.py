"""`--data A.csv=2,B/` as token shards with weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from errors import UserError
from text.shard_set import ShardSet
from text.shards import open_or_wait, prepare_shards
from text.tokenizer import Tokenizer


def split_weights(data: str) -> list[tuple[str, float]]:
    """`a.csv=2,b.jsonl` -> [("a.csv", 2.0), ("b.jsonl", 1.0)]. A name that exists is never cut at its '='."""
    sources = []
    for entry in (part.strip() for part in data.split(",")):
        path, mark, weight = entry.rpartition("=")
        if not mark or Path(entry).exists():
            path, weight = entry, "1"
        try:
            share = float(weight)
        except ValueError:
            raise UserError(f"--data {entry}: {weight!r} is not a weight; write PATH=NUMBER") from None
        if not path or not share > 0:
            raise UserError(f"--data {data}: each entry is PATH or PATH=WEIGHT with a weight above 0")
        sources.append((path, share))
    return sources


def open_sources(
    data: str, tokenizer: Tokenizer, shards: str | Path, main: bool, workers: int = 0, **options: Any
) -> list[tuple[ShardSet, float]]:
    """Each source of `data` as shards in its own folder under `shards`, made by one process while the others wait.

    Args:
        main: whether this process is the one that tokenises. options: see `text.shards.prepare_shards`.
    """
    opened = []
    for path, weight in split_weights(data):
        # Another tokenizer or another file of the same name is another folder: nothing finished is overwritten.
        key = hashlib.sha256(f"{Path(path).absolute()}|{tokenizer.fingerprint}".encode()).hexdigest()[:8]
        folder = Path(shards) / f"{Path(path).stem or 'data'}-{key}"
        if main:
            opened.append((prepare_shards(path, tokenizer, folder, workers=workers, **options), weight))
        else:
            opened.append((open_or_wait(path, tokenizer, folder, **options), weight))
    return opened
