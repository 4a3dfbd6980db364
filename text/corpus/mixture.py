"""The sources of a pretraining mixture as token shards with weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from text.corpus.shard_set import ShardSet
from text.corpus.shards import are_ready, open_or_wait, prepare_shards
from text.sources.formats import Layout
from text.sources.registry import Source, weights
from text.tokenizer import Tokenizer


def open_sources(
    sources: list[Source],
    tokenizer: Tokenizer,
    shards: str | Path,
    main: bool,
    workers: int = 0,
    check: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[tuple[ShardSet, float]]:
    """Open each source as shards in its own folder under `shards`, made by one process while the others wait.

    Without any weight all of the sources are one, of weight 1.

    Args:
        main: whether this process is the one that tokenises. check: what the others call while they wait, and what
            raises when that one has failed. options: see `text.corpus.shards.prepare_shards`.
    """
    opened = []
    for group, folder, weight in _groups(sources, shards):
        if main:
            opened.append((prepare_shards(group, tokenizer, folder, workers=workers, **options), weight))
        else:
            opened.append((open_or_wait(group, tokenizer, folder, check=check, **options), weight))
    return opened


def sources_ready(sources: list[Source], tokenizer: Tokenizer, shards: str | Path, **options: Any) -> bool:
    """Return whether this process finds the shards of all sources finished; arguments as of `open_sources`."""
    return all(are_ready(group, tokenizer, folder, **options) for group, folder, _ in _groups(sources, shards))


def _groups(sources: list[Source], shards: str | Path) -> Iterator[tuple[list[Source], Path, float]]:
    """Yield the sources that share a folder of shards, that folder, and their weight."""
    mixture = weights(sources)
    groups = [sources] if mixture is None else [[source] for source in sources]
    for group, weight in zip(groups, mixture or [1.0], strict=True):
        yield group, Path(shards) / _folder_name(group), weight


def _folder_name(group: list[Source]) -> str:
    """Return one that distinguishes two files of one name in different folders, and two ways to read one file."""
    paths = ",".join(source.path if source.subset is None else f"{source.path}:{source.subset}" for source in group)
    key = str(Path(paths).absolute())
    special = [source for source in group if (source.layout, source.samples, source.split) != (Layout(), None, "train")]
    if special:
        key += repr([(source.path, source.layout, source.samples, source.seed, source.split) for source in special])
    return f"{Path(paths).stem or 'data'}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
