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
    """`a.csv=2,b.jsonl` -> [("a.csv", 2.0), ("b.jsonl", 1.0)]; without any weight all of it is one source of weight 1.

    A name that exists is never cut at its '='.
    """
    sources, weighted = [], False
    for entry in (part.strip() for part in data.split(",")):
        path, mark, weight = entry.rpartition("=")
        if not mark or Path(entry).exists():
            path, weight = entry, "1"
        else:
            weighted = True
        try:
            share = float(weight)
        except ValueError:
            raise UserError(f"--data {entry}: {weight!r} is not a weight; write PATH=NUMBER") from None
        if not path or not 0 < share < float("inf"):
            raise UserError(f"--data {data}: each entry is PATH or PATH=WEIGHT with a weight above 0")
        sources.append((path, share))
    return sources if weighted else [(data, 1.0)]


def open_sources(
    data: str, tokenizer: Tokenizer, shards: str | Path, main: bool, workers: int = 0, **options: Any
) -> list[tuple[ShardSet, float]]:
    """Each source of `data` as shards in its own folder under `shards`, made by one process while the others wait.

    Args:
        main: whether this process is the one that tokenises. options: see `text.shards.prepare_shards`.
    """
    opened = []
    for path, weight in split_weights(data):
        # Two files of one name in different folders must not meet in one.
        key = hashlib.sha256(str(Path(path).absolute()).encode()).hexdigest()[:8]
        folder = Path(shards) / f"{Path(path).stem or 'data'}-{key}"
        if main:
            opened.append((prepare_shards(path, tokenizer, folder, workers=workers, **options), weight))
        else:
            opened.append((open_or_wait(path, tokenizer, folder, **options), weight))
    return opened
