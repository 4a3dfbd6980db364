"""The sources of a pretraining run as token shards: opened where they are made already, else made by one process."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from errors import UserError
from text.corpus.shard_set import INDEX, SPLITS, Recipe, ShardSet, find_damage, other_work, read_index
from text.sources.formats import Layout
from text.sources.registry import Source, weights
from text.tokenizer import MAX_VOCAB_SIZE, Tokenizer

LOCK = "lock"


def open_sources(
    sources: list[Source],
    tokenizer: Tokenizer,
    shards: str | Path,
    main: bool,
    check: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[tuple[ShardSet, float]]:
    """Open each source as shards in its own folder under `shards`, made by one process while the others wait.

    Without any weight all of the sources are one, of weight 1.

    Args:
        main: whether this process is the one that tokenises. check: what the others call while they wait, and what
            raises when that one has failed. options: see `prepare_shards`.
    """
    opened = []
    for group, folder, weight in _groups(sources, tokenizer, shards, **options):
        if main:
            _print_other_work(folder, _recipe(**options).work(tokenizer))
            opened.append((prepare_shards(group, tokenizer, folder, **options), weight))
            continue
        target = _target(group, tokenizer, **options)
        while not _is_ready(folder, target):
            check()
            time.sleep(0.2)
        opened.append((ShardSet.open(folder, tokenizer, checksums=False), weight))
    return opened


def sources_ready(sources: list[Source], tokenizer: Tokenizer, shards: str | Path, **options: Any) -> bool:
    """Return whether this process finds the shards of all sources finished; arguments as of `open_sources`.

    Raises `UserError` for data that are not there.
    """
    groups = _groups(sources, tokenizer, shards, **options)
    return all([_is_ready(out, _target(group, tokenizer, **options)) for group, out, _ in groups])


def _groups(
    sources: list[Source], tokenizer: Tokenizer, shards: str | Path, **options: Any
) -> Iterator[tuple[list[Source], Path, float]]:
    """Yield the sources that share a folder of shards, that folder, and their weight."""
    mixture, recipe = weights(sources), _recipe(**options)
    groups = [sources] if mixture is None else [[source] for source in sources]
    for group, weight in zip(groups, mixture or [1.0], strict=True):
        yield group, recipe.folder(Path(shards) / _folder_name(group), tokenizer), weight


def _folder_name(group: list[Source]) -> str:
    """Return one that distinguishes two files of one name in different folders, and two ways to read one file."""
    paths = ",".join(source.path if source.subset is None else f"{source.path}:{source.subset}" for source in group)
    key = str(Path(paths).absolute())
    special = [source for source in group if (source.layout, source.samples, source.split) != (Layout(), None, "train")]
    if special:
        key += repr([(source.path, source.layout, source.samples, source.seed, source.split) for source in special])
    return f"{Path(paths).stem or 'data'}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _print_other_work(folder: Path, work: dict[str, Any]) -> None:
    """Print why the newest other shards of the same data are not used, where this folder has none yet."""
    plain, _, _ = folder.name.rpartition("-")
    others = folder.parent.glob(f"{escape(plain)}*/{INDEX}") if not (folder / INDEX).exists() else ()
    for index in sorted(others, key=lambda file: file.stat().st_mtime)[-1:]:
        with suppress(UserError):
            changes = other_work(read_index(index.parent), work)
            print(f"{index.parent} stays and is not used: {', '.join(changes)}; tokenising into {folder.name}")


def _recipe(workers: int = 0, **options: Any) -> Recipe:
    return Recipe(**options)


def _target(group: list[Source], tokenizer: Tokenizer, **options: Any) -> dict[str, Any]:
    return _recipe(**options).begun(group, tokenizer)[1]


def _is_ready(out: Path, target: dict[str, Any]) -> bool:
    index = read_index(out)
    return index is not None and index["complete"] and not _changes(index, target)


def prepare_shards(
    data: str | Sequence[Source], tokenizer: Tokenizer, out: str | Path, *, workers: int = 0, **options: Any
) -> ShardSet:
    """Tokenise `data` (see `Corpus`) into the folder `out`, on `workers` threads (0: all cores). options: a `Recipe`.

    What is finished is opened at once, what was interrupted is continued; when the tokenizer, the files (by path, size
    or modification time) or the recipe changed, that is reported and the work done again. Prints what became of the
    documents. Raises `UserError` for a vocabulary above 65,535 and for data that are refused, of which nothing is left
    in `out`; `OSError` when the disk fills: then finished shards stay and the next call continues after them.
    """
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"tokenizer: {tokenizer.vocab_size:,} tokens do not fit 16-bit shards; use at most {MAX_VOCAB_SIZE:,}"
        )
    recipe, out = Recipe(**options), Path(out)
    corpus, index = recipe.begun(data, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out):
        for file in out.glob("*.tmp"):  # what a killed run left
            file.unlink()
        index["parts"], complete = _finished_parts(out, index)
        if complete:
            tokens, documents = (total(index["parts"], what) for what in ("tokens", "documents"))
            print(f"{out}: {tokens:,} tokens of {documents:,} documents are ready and used again")
            return ShardSet.open(out, tokenizer, checksums=False)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        try:
            make = resolve_name("text.corpus.tokenising:make_parts")
            make(corpus, recipe, index, out, tokenizer, workers or cores)
        except UserError:
            if not index["parts"]:
                (out / LOCK).unlink()
                with suppress(OSError):  # something of somebody else is there
                    os.removedirs(out)
            raise
    return ShardSet.open(out, tokenizer, checksums=False)


def _changes(found: dict[str, Any], target: dict[str, Any]) -> list[str]:
    """Return in which ways the work of one index is not that of another, in words."""
    return other_work(found, target) + (["the data changed"] if found["sources"] != target["sources"] else [])


def _finished_parts(out: Path, target: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """Return the reusable parts of an earlier run, and whether they are all; print why others are not."""
    found = read_index(out)
    if found is None:
        return [], False
    if changes := _changes(found, target):
        print(f"{out}: {' and '.join(changes)}; tokenising again")
        for file in (out / INDEX, *(file for split in SPLITS for file in out.glob(f"{split}-*"))):
            file.unlink()
        return [], False
    for number, part in enumerate(found["parts"]):
        if damage := find_damage(out, part):
            print(f"{damage}; tokenising again from there")
            return found["parts"][:number], False
    return found["parts"], found["complete"]


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Keep two processes from preparing the same folder; the system lifts the lock when a process ends."""
    with open(out / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{out}: another process is preparing these shards; wait for it or choose another folder"
            raise UserError(message) from error
        except OSError as error:
            print(f"notice: {out / LOCK}: this file system has no locks ({error.strerror})", file=sys.stderr)
        yield


def total(parts: Sequence[dict[str, Any]], what: str, splits: Sequence[str] = SPLITS) -> int:
    """Return how many tokens, documents or bytes are in parts of the index."""
    return sum(part[split][what] for part in parts for split in splits if part[split])
