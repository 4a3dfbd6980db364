"""Documents become token shards, on several cores, continued where they were interrupted.

The work is cut into parts. A part is the documents, in the order of the corpus, up to the one that brings its tokens
to `shard_tokens`; it becomes one train shard and one val shard, and then the index is written again. What was
interrupted resumes with the next part: the corpus before it is read again, which finds the duplicates again, but not
tokenised again. The shards depend on the corpus and the recipe alone, not on the workers or on interruptions.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tqdm import tqdm

from errors import UserError
from text.corpus.corpus import Corpus
from text.corpus.documents import Cleaner
from text.corpus.encoding import Part, encode, parts
from text.corpus.shard_set import INDEX, SPLITS, Recipe
from text.corpus.shards import total
from text.files import json_text, peak_memory, replacing
from text.sources.row_report import balance
from text.tokenizer import Tokenizer


def make_parts(
    corpus: Corpus, recipe: Recipe, index: dict[str, Any], out: Path, tokenizer: Tokenizer, workers: int
) -> None:
    """Make the parts that are not in the index yet, and the finished index."""
    begin, report, finished = time.monotonic(), corpus.report, len(index["parts"])
    done = index["parts"][-1]["read"] if finished else 0
    if finished:
        print(f"{out}: continuing after {finished} finished parts, {done:,} documents")
    # In a log file each refresh is a line.
    pace = {"mininterval": 0.2 if sys.stderr.isatty() else 30.0, "dynamic_ncols": True}
    bar = tqdm(total=corpus.size or None, unit="B", unit_scale=True, desc="tokenise", **pace)
    with closing(Cleaner(report, out, recipe.min_chars)) as cleaner, bar:
        kept = _kept_documents(corpus, cleaner, done, bar)
        documents = encode(kept, tokenizer, workers, recipe.infilling)
        for number, part in enumerate(parts(documents, recipe.shard_tokens), finished):
            if not number:
                tokenizer.save(out / "tokenizer")
            index["parts"].append(_write_part(out, number, part, recipe.val_fraction, index["parts"]))
            _write_index(out, index)
    if not index["parts"]:
        reasons = "; ".join(line.strip() for line in report.problem_lines())
        raise UserError(report.first_error or f"{corpus.data}: no document is left after cleaning ({reasons})")
    index["complete"] = True
    _write_index(out, index)
    seconds = time.monotonic() - begin
    speed = total(index["parts"][finished:], "bytes") / 1e6 / seconds
    _print_table(index["parts"], corpus, cleaner.characters, f"{speed:.1f} MB/s on {workers} cores, {seconds:.1f} s")


def _kept_documents(corpus: Corpus, cleaner: Cleaner, done: int, bar: tqdm) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number in the corpus from 1, hash, UTF-8 bytes) of each accepted document after the first `done`."""
    for number, document in enumerate(corpus, 1):
        accepted = cleaner.accept(*document)
        if accepted and number > done:
            yield number, *accepted
        if number % 256 == 0:
            bar.update(corpus.report.bytes_read - bar.n)
    bar.update(corpus.report.bytes_read - bar.n)


def _write_part(
    out: Path, number: int, part: Part, val_fraction: float, earlier: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write one part as a train and a val shard; return its part of the index."""
    has_train, has_val = (any(made[split] for made in earlier) for split in SPLITS)
    held_out = _hold_out(np.frombuffer(part.hashes, np.uint64), val_fraction, has_train, has_val)
    lengths, sizes = np.frombuffer(part.lengths, np.uint32), np.frombuffer(part.sizes, np.uint32)
    stream, ends = np.frombuffer(part.tokens, np.uint16), np.cumsum(lengths, dtype=np.int64)
    shards = {}
    for split, chosen in zip(SPLITS, (~held_out, held_out), strict=True):
        tokens = (stream[ends[place] - lengths[place] : ends[place]] for place in np.flatnonzero(chosen))
        name = f"{split}-{number:05d}"
        shards[split] = write_shard(out, name, tokens, lengths[chosen], sizes[chosen]) if chosen.any() else None
    moved = {"moved": part.moved} if part.moved else {}
    return {"read": part.last, **moved, **shards}


def _hold_out(hashes: np.ndarray, fraction: float, has_train: bool, has_val: bool) -> np.ndarray:
    """Return which documents are for validation, (documents,) bool: a share by hash, at least one of two documents.

    has_...: whether earlier parts have such documents.
    """
    held_out = hashes < np.uint64(int(fraction * 2**64))
    if fraction and not has_val and not held_out.any():
        held_out[hashes.argmin()] = True
    if not has_train and held_out.all():
        held_out[hashes.argmax()] = False
    return held_out


def write_shard(
    folder: Path, name: str, tokens: Iterable[np.ndarray], lengths: np.ndarray, sizes: np.ndarray
) -> dict[str, Any]:
    """Write one shard and its bounds; return its entry in the index. On an error the files are as they were before.

    lengths, sizes: (documents,) uint32, tokens and UTF-8 bytes of each.
    """
    ends = np.cumsum(lengths, dtype=np.uint32)
    bounds = io.BytesIO()
    np.save(bounds, np.stack([ends, sizes], axis=1))
    counts = {"tokens": int(ends[-1]), "documents": len(lengths), "bytes": int(sizes.sum(dtype=np.int64))}
    entry = {"name": name, **counts}
    pieces = {
        "bin": (part.astype("<u2", copy=False).view(np.uint8).data for part in tokens),
        "npy": [bounds.getbuffer()],
    }
    for suffix, buffers in pieces.items():
        digest, size = xxhash.xxh3_64(), 0
        with replacing(folder / f"{name}.{suffix}") as stream:
            for buffer in buffers:
                digest.update(buffer)
                size += stream.write(buffer)
        entry |= {f"{suffix}_size": size, f"{suffix}_checksum": digest.hexdigest()}
    return entry


def _write_index(out: Path, index: dict[str, Any]) -> None:
    with replacing(out / INDEX) as stream:
        stream.write(json_text(index, indent=1).encode())


def _share_moved(parts: list[dict[str, Any]]) -> str:
    moved, documents = sum(part.get("moved", 0) for part in parts), total(parts, "documents")
    return f"to the end, to be filled in, in {moved:,} documents, {moved / documents:.2%}"


def _print_table(parts: list[dict[str, Any]], corpus: Corpus, characters: int, speed: str) -> None:
    """Print what became of the documents."""
    tokens, size, report = total(parts, "tokens"), total(parts, "bytes"), corpus.report
    fates = {"to train on": total(parts, "documents", ["train"]), "held out": total(parts, "documents", ["val"])}
    rows = [
        ("of the corpus", balance(report.rows, "documents", {**fates, **report.unused_by_kind})),
        *(("", line.strip()) for line in [*report.unread, *report.problem_lines()]),
        ("tokens", f"{tokens:,}, {total(parts, 'tokens', ['val']):,} of them for validation"),
        *([("middle moved", _share_moved(parts))] if any("moved" in part for part in parts) else []),
        ("bytes of text", f"{size:,}, {size / tokens:.2f} a token"),
        ("characters", f"{characters:,}, {characters / tokens:.2f} a token"),
        ("speed", speed),
        ("peak memory", f"{peak_memory() / 1e6:,.0f} MB"),
    ]
    print("\n".join(f"  {name:<16}{value}" for name, value in rows))
