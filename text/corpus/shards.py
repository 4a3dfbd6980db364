"""From a corpus of any format to token shards: once, by several processes, and continued where it was interrupted.

The work is cut into parts. A part is the documents, in the order of the corpus, up to the one that brings its tokens
to `shard_tokens`; it becomes one train shard and one val shard, and then the index is written anew. What was
interrupted goes on with the next part: the corpus before it is read again, which finds the duplicates again, but not
tokenised again. The shards depend on the corpus and the recipe alone, not on the workers or on interruptions.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from errors import UserError
from text.corpus.cleaning import Cleaner, Report, SeenHashes
from text.corpus.encoders import EncoderPool, peak_memory
from text.corpus.shard_set import INDEX, LAYOUT, SPLITS, ShardSet, find_damage, read_index, write_safely
from text.sources.parts import batches, parts
from text.sources.readers import Corpus
from text.sources.registry import Source
from text.sources.row_report import balance
from text.tokenizer import MAX_VOCAB_SIZE, Tokenizer

__all__ = ["ShardSet", "are_ready", "open_or_wait", "prepare_shards"]

LOCK = "lock"
HEARTBEAT_SECONDS = 5.0


@dataclass(frozen=True)
class Recipe:
    """What decides, with the corpus and the tokenizer, what the shards hold.

    `shard_tokens`: tokens of a part, 128 MB at the default. `val_fraction`: share of documents that is held out, chosen
    by their hash; of two documents or more each split gets at least one, unless the fraction is 0.
    """

    column: str | None = None
    on_error: str = "skip"
    encoding: str = "utf-8"
    min_chars: int = 1
    val_fraction: float = 0.005
    shard_tokens: int = 1 << 26

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction {self.val_fraction}: give a share from 0 to below 1")
        if not 0 < self.shard_tokens <= 1 << 30:
            raise UserError(f"shard_tokens {self.shard_tokens}: give 1 to {1 << 30}")

    def corpus(self, data: str | Sequence[Source]) -> Corpus:
        return Corpus(data, self.column, self.on_error, self.encoding)


def prepare_shards(
    data: str | Sequence[Source],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    column: str | None = None,
    on_error: str = "skip",
    encoding: str = "utf-8",
    workers: int = 0,
    val_fraction: float = 0.005,
    min_chars: int = 1,
    shard_tokens: int = 1 << 26,
) -> ShardSet:
    """Tokenise `data` (see `Corpus`) into the folder `out`; `workers=0` uses all cores.

    What is finished is opened at once, what was interrupted is continued, and when the tokenizer, the files (by path,
    size or modification time) or the recipe changed, that is said and the work done anew. Prints what became of the
    documents. Raises `UserError` for a vocabulary above 65,535 and for data that are refused, of which nothing is left
    in `out`; `OSError` when the disk fills: then finished shards stay and the next call goes on from them. Of the ranks
    of a run one calls this, the others `open_or_wait`.
    """
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"tokenizer: {tokenizer.vocab_size:,} tokens do not fit 16-bit shards; use at most {MAX_VOCAB_SIZE:,}"
        )
    recipe = Recipe(column, on_error, encoding, min_chars, val_fraction, shard_tokens)
    corpus, out = recipe.corpus(data), Path(out)
    index = _new_index(corpus, recipe, tokenizer)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out):
        for file in out.glob("*.tmp"):  # what a killed run left
            file.unlink()
        index["parts"], complete = _finished_parts(out, index)
        if complete:
            found = ShardSet.open(out, tokenizer, checksums=False)
            streams = [found.split(split) for split in SPLITS]
            tokens, documents = (sum(getattr(each, what) for each in streams) for what in ("tokens", "documents"))
            print(f"{out}: {tokens:,} tokens of {documents:,} documents are ready and used again")
            return found
        tokenizer.save(out / "tokenizer")
        try:
            _prepare(corpus, recipe, index, out, workers)
        except UserError:
            if not index["parts"]:  # nothing that could be continued
                _remove(out, made)
            raise
    return ShardSet.open(out, tokenizer, checksums=False)


def open_or_wait(
    data: str | Sequence[Source],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    timeout: float = 600.0,
    check: Callable[[], None] = lambda: None,
    **options: Any,
) -> ShardSet:
    """What `prepare_shards` of another process makes of the same data and options, as soon as it is finished.

    check: called now and then; raises when that process has failed.
    Raises `UserError` when it gave no sign of life for `timeout` seconds.
    """
    options.pop("workers", None)
    recipe = Recipe(**options)
    out = Path(out)
    wanted = _new_index(recipe.corpus(data), recipe, tokenizer)
    last_sign, signs = time.monotonic(), None
    while True:
        index = read_index(out)
        if index is not None and index["complete"] and not _changes(index, wanted):
            return ShardSet.open(out, tokenizer, checksums=False)
        check()
        if signs != (signs := _stamp(out / INDEX)):
            last_sign = time.monotonic()
        elif time.monotonic() - last_sign >= timeout:
            raise UserError(f"{out}: no process has prepared shards for {timeout:.0f} s; look at rank 0's output")
        time.sleep(min(0.5, timeout / 4))


def are_ready(
    data: str | Sequence[Source], tokenizer: Tokenizer, out: str | Path, *, workers: int = 0, **options: Any
) -> bool:
    """Whether this process finds in `out` all that `prepare_shards` would make of the same data and options.

    Raises `UserError` for data that are not there.
    """
    recipe = Recipe(**options)
    wanted, index = _new_index(recipe.corpus(data), recipe, tokenizer), read_index(Path(out))
    return index is not None and index["complete"] and not _changes(index, wanted)


def _prepare(corpus: Corpus, recipe: Recipe, index: dict[str, Any], out: Path, workers: int) -> None:
    """Make the parts that are not in the index yet, and the finished index."""
    begin, report = time.monotonic(), corpus.report
    finished = len(index["parts"])
    done = index["parts"][-1]["read"] if finished else 0
    _write_json(out / INDEX, index)
    if finished:
        print(f"{out}: continuing after {finished} finished parts, {done:,} documents")
    seen = SeenHashes(out)
    bar = tqdm(total=corpus.size or None, unit="B", unit_scale=True, desc="tokenise", **_bar_pace())
    try:
        with EncoderPool(out / "tokenizer", workers) as pool:
            documents = _kept_documents(corpus, Cleaner(report, seen, recipe.min_chars), done, bar, out / INDEX)
            for number, part in enumerate(parts(pool.map(batches(documents)), recipe.shard_tokens), finished):
                has = {split: any(made[split] for made in index["parts"]) for split in SPLITS}
                index["parts"].append(part.write(out, number, recipe.val_fraction, has["train"], has["val"]))
                _write_json(out / INDEX, index)
            index["workers"], pool_memory = pool.workers, pool.peak_memory
    finally:
        bar.close()
        seen.close()
    if not index["parts"]:
        reasons = "; ".join(report.summary())
        raise UserError(report.first_problem or f"{corpus.data}: no document is left after cleaning ({reasons})")
    index["complete"] = True
    index["report"] = {
        "kept": report.kept,
        "characters": report.characters,
        "counts": report.counts,
        "examples": report.examples,
    }
    _write_json(out / INDEX, index)
    _print_table(index, finished, report, time.monotonic() - begin, peak_memory() + pool_memory)


def _kept_documents(
    corpus: Corpus, cleaner: Cleaner, done: int, bar: tqdm, index_file: Path
) -> Iterator[tuple[int, int, bytes]]:
    """(number in the corpus from 1, hash, UTF-8 bytes) of each kept document after the first `done` of the corpus."""
    heartbeat = time.monotonic()
    for number, document in enumerate(corpus, 1):
        kept = cleaner.accept(*document)
        if kept and number > done:
            yield number, *kept
        if number % 256 == 0:
            bar.update(corpus.position - bar.n)
            if time.monotonic() - heartbeat > HEARTBEAT_SECONDS:
                heartbeat = time.monotonic()
                os.utime(index_file)
    bar.update(corpus.position - bar.n)


def _new_index(corpus: Corpus, recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "layout": LAYOUT,
        "complete": False,
        "fingerprint": tokenizer.fingerprint,
        "eos_id": tokenizer.eos_id,
        "sources": corpus.identity(),
        "recipe": asdict(recipe),
        "parts": [],
    }


def _changes(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """In which ways the work of one index is not that of another, in words."""
    changes = []
    if found["fingerprint"] != wanted["fingerprint"]:
        changes.append(f"the tokenizer changed ({found['fingerprint']} to {wanted['fingerprint']})")
    if found["sources"] != wanted["sources"]:
        changes.append("the data changed")
    if options := [name for name in wanted["recipe"] if found["recipe"].get(name) != wanted["recipe"][name]]:
        changes.append(f"other options ({', '.join(options)})")
    return changes


def _finished_parts(out: Path, wanted: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """The parts of an earlier run that can be used again, and whether they are all; says why others cannot."""
    found = read_index(out)
    if found is None:
        return [], False
    if changes := _changes(found, wanted):
        print(f"{out}: {' and '.join(changes)}; tokenising again")
        (out / INDEX).unlink()
        for shard in filter(None, (part[split] for part in found["parts"] for split in SPLITS)):
            for suffix in ("bin", "npy"):
                (out / f"{shard['name']}.{suffix}").unlink(missing_ok=True)
        return [], False
    for number, part in enumerate(found["parts"]):
        if damage := find_damage(out, part):
            print(f"{damage}; tokenising again from there")
            return found["parts"][:number], False
    return found["parts"], found["complete"]


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_safely(file, [np.frombuffer(json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8"), np.uint8)])


def _remove(out: Path, made: Sequence[Path]) -> None:
    """Remove what stands in a folder without any shard, and the folders that were made for it."""
    shutil.rmtree(out / "tokenizer", ignore_errors=True)
    for file in (out / INDEX, out / LOCK):
        file.unlink(missing_ok=True)
    with suppress(OSError):  # something of somebody else is in one of them
        for folder in made or [out]:
            folder.rmdir()


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Keep two processes from preparing the same folder; the system lifts the lock when a process ends."""
    with open(out / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{out}: another process is preparing these shards; wait for it or choose another folder"
                ) from error
            print(f"notice: {out / LOCK}: this file system has no locks ({error.strerror})", file=sys.stderr)
        yield


def _stamp(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _bar_pace() -> dict[str, Any]:
    # In a log file each refresh is a line.
    return {"mininterval": 0.2 if sys.stderr.isatty() else 30.0, "dynamic_ncols": True}


def _print_table(index: dict[str, Any], done: int, report: Report, seconds: float, memory: int) -> None:
    """What became of the documents. Speed is that of the parts from number `done` on, memory that of all processes."""
    shards = [part[split] for part in index["parts"] for split in SPLITS if part[split]]
    tokens, size = sum(shard["tokens"] for shard in shards), sum(shard["bytes"] for shard in shards)
    val = sum(part["val"]["tokens"] for part in index["parts"] if part["val"])
    fresh = sum(part[split]["bytes"] for part in index["parts"][done:] for split in SPLITS if part[split])
    train, held = (sum(part[split]["documents"] for part in index["parts"] if part[split]) for split in SPLITS)
    unused = report.unused
    rows = [
        ("documents kept", f"{report.kept:,}"),
        (
            "of the corpus",
            balance(
                train + held + sum(unused.values()), "documents", {"to train on": train, "held out": held, **unused}
            ),
        ),
        *(("not kept", line) for line in report.summary()),
        ("tokens", f"{tokens:,}, {val:,} of them for validation"),
        ("bytes of text", f"{size:,}, {size / tokens:.2f} a token"),
        ("characters", f"{report.characters:,}, {report.characters / tokens:.2f} a token"),
        ("speed", f"{fresh / 1e6 / seconds:.1f} MB/s, {index['workers']} processes, {seconds:.1f} s"),
        ("peak memory", f"{memory / 1e6:,.0f} MB, all processes together"),
    ]
    print("\n".join(f"  {name:<16}{value}" for name, value in rows))
