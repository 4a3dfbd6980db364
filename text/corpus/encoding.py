"""Documents become tokens on several cores, in order, and gather in the parts that are written to disk."""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from text.corpus.infilling import Infilling

# A thread gets this many bytes of text at once, and so many batches wait for each, so that it never does.
BATCH_BYTES, QUEUED = 1 << 18, 3


class Encoded(NamedTuple):
    """A document: its number in the corpus from 1, its hash, its UTF-8 bytes, and its tokens with `</s>`, uint16.

    moved: whether its middle stands at the end.
    """

    number: int
    digest: int
    size: int
    tokens: array
    moved: bool = False


def encode(
    documents: Iterable[tuple[int, int, bytes]],
    tokenizer: Tokenizer,
    workers: int,
    infilling: Infilling | None = None,
) -> Iterator[Encoded]:
    """Encode (number, hash, UTF-8 bytes) of documents on `workers` threads, in order.

    `tokenizers` holds no GIL while it encodes a batch, so threads are as fast as processes, in less memory.
    """
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads of its own below these
    waiting: deque[Future[list[Encoded]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for batch in _batches(documents):
            waiting.append(pool.submit(_encode, batch, tokenizer, infilling))
            if len(waiting) >= QUEUED * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        if parallelism is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism


class Part:
    """Documents gathered in memory, 2 bytes a token: all tokens joined, and of each document what the shards need."""

    def __init__(self) -> None:
        self.tokens, self.lengths, self.sizes, self.hashes = array("H"), array("I"), array("I"), array("Q")
        self.last = self.moved = 0

    def add(self, document: Encoded) -> None:
        self.tokens.extend(document.tokens)
        self.lengths.append(len(document.tokens))
        self.sizes.append(document.size)
        self.hashes.append(document.digest)
        self.last = document.number
        self.moved += document.moved


def parts(documents: Iterable[Encoded], shard_tokens: int) -> Iterator[Part]:
    """Gather documents; a part ends with the document that brings it to `shard_tokens`."""
    part = Part()
    for document in documents:
        part.add(document)
        if len(part.tokens) >= shard_tokens:
            yield part
            part = Part()
    if part.last:
        yield part


def _batches(documents: Iterable[tuple[int, int, bytes]]) -> Iterator[list[tuple[int, int, bytes]]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[2])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    batch: list[tuple[int, int, bytes]], tokenizer: Tokenizer, infilling: Infilling | None = None
) -> list[Encoded]:
    pieces: list[str] = []
    taken = [infilling is not None and infilling.takes(digest) for _, digest, _ in batch]
    for moved, (_, digest, data) in zip(taken, batch, strict=True):
        text = data.decode("utf-8")
        pieces += infilling.parts(text, digest) if moved else (text,)
    encoded, made = iter(tokenizer.encode_batch(pieces)), []
    for moved, (number, digest, data) in zip(taken, batch, strict=True):
        ids = infilling.join(tokenizer, next(encoded), next(encoded), next(encoded)) if moved else next(encoded)
        made.append(Encoded(number, digest, len(data), array("H", [*ids, tokenizer.eos_id]), moved))
    return made
