"""The parts of a corpus on their way to disk: tokenised documents, and which of them are held out for validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from text.corpus.encoders import Encoded
from text.corpus.shard_set import write_shard

# A process gets this many bytes of text at once: enough that the pipe costs little, few enough to take little memory.
BATCH_BYTES = 1 << 18


class Documents(NamedTuple):
    """What is known of a batch of documents beside their tokens; each (documents,)."""

    numbers: np.ndarray
    """Place in the corpus, from 1, int64."""
    hashes: np.ndarray
    """uint64"""
    sizes: np.ndarray
    """UTF-8 bytes, uint32"""

    @classmethod
    def of(cls, numbers: list[int], hashes: list[int], texts: list[bytes]) -> Documents:
        sizes = np.array([len(text) for text in texts], np.uint32)
        return cls(np.array(numbers, np.int64), np.array(hashes, np.uint64), sizes)


class Part:
    """Documents gathered in memory, 2 bytes a token, until they are written as one train and one val shard."""

    def __init__(self) -> None:
        self.tokens = 0
        self._pieces: list[tuple[Documents, Encoded]] = []

    def add(self, documents: Documents, encoded: Encoded, begin: int, stop: int) -> None:
        """Add documents begin to stop of a batch."""
        first, last = int(encoded.lengths[:begin].sum()), int(encoded.lengths[:stop].sum())
        piece = Encoded(encoded.tokens[first:last], encoded.lengths[begin:stop])
        self._pieces.append((Documents(*(values[begin:stop] for values in documents)), piece))
        self.tokens += last - first

    def write(self, folder: Path, number: int, val_fraction: float, has_train: bool, has_val: bool) -> dict[str, Any]:
        """Write the shards; returns their part of the index. `has_...`: whether earlier parts have such documents."""
        hashes = np.concatenate([documents.hashes for documents, _ in self._pieces])
        held_out = _hold_out(hashes, val_fraction, has_train, has_val)
        return {
            "read": int(self._pieces[-1][0].numbers[-1]),
            "train": self._write_split(folder, f"train-{number:05d}", ~held_out),
            "val": self._write_split(folder, f"val-{number:05d}", held_out),
        }

    def _write_split(self, folder: Path, name: str, chosen: np.ndarray) -> dict[str, Any] | None:
        if not chosen.any():
            return None
        masks = np.split(chosen, np.cumsum([len(encoded.lengths) for _, encoded in self._pieces])[:-1])
        pieces = list(zip(masks, self._pieces, strict=True))
        return write_shard(
            folder,
            name,
            (encoded.tokens[np.repeat(mask, encoded.lengths)] for mask, (_, encoded) in pieces),
            np.concatenate([encoded.lengths[mask] for mask, (_, encoded) in pieces]),
            np.concatenate([documents.sizes[mask] for mask, (documents, _) in pieces]),
        )


def batches(documents: Iterable[tuple[int, int, bytes]]) -> Iterator[tuple[Documents, list[bytes]]]:
    """Documents by `BATCH_BYTES`, as (numbers, hashes and bytes, texts)."""
    numbers, hashes, texts, size = [], [], [], 0
    for number, digest, text in documents:
        numbers.append(number)
        hashes.append(digest)
        texts.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield Documents.of(numbers, hashes, texts), texts
            numbers, hashes, texts, size = [], [], [], 0
    if texts:
        yield Documents.of(numbers, hashes, texts), texts


def parts(encoded_batches: Iterable[tuple[Documents, Encoded]], shard_tokens: int) -> Iterator[Part]:
    """Gather encoded batches into parts; a part ends with the document that brings it to `shard_tokens`."""
    part = Part()
    for documents, encoded in encoded_batches:
        begin = 0
        while begin < len(encoded.lengths):
            ends = part.tokens + np.cumsum(encoded.lengths[begin:], dtype=np.int64)
            stop = begin + int(np.searchsorted(ends, shard_tokens)) + 1
            part.add(documents, encoded, begin, stop)
            begin = stop
            if part.tokens >= shard_tokens:
                yield part
                part = Part()
    if part.tokens:
        yield part


def _hold_out(hashes: np.ndarray, fraction: float, has_train: bool, has_val: bool) -> np.ndarray:
    """Which documents are for validation, (documents,) bool: a share by hash, and of two documents at least one."""
    held_out = hashes < np.uint64(int(fraction * 2**64))
    if fraction and not has_val and not held_out.any():
        held_out[hashes.argmin()] = True
    if not has_train and held_out.all():
        held_out[hashes.argmax()] = False
    return held_out
