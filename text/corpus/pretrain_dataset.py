"""Pretraining windows over token shards, mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from errors import UserError
from text.corpus.shard_set import ShardSet
from text.order import IGNORED_LABEL, PADDING_SEGMENT, block_shares, content_hash, mixed, shuffled


class PretrainDataset:
    """Windows of consecutive tokens over the shards' documents, as DeepSeek-V3 packs them (section 4.2).

    Window w holds tokens w*L to w*L + L of a source's stream: L inputs, and the same shifted by one as labels.

    `split="train"`: an epoch shows every full window once, shuffled again each epoch; the last, partial window is left
    out. Several sources are mixed by weight, to 1/4096: each goes through its own epochs at its own pace, and `len` is
    the windows of all. `split="val"`: every token but a stream's first is a label exactly once, in order, weights
    aside, and the last window is filled up with </s> inputs and labels that count nothing.

    `isolate=True` makes each document a segment; the first token of a document is then no label, since the position
    before it belongs to another segment.
    """

    def __init__(
        self,
        sources: list[tuple[ShardSet, float]],
        sequence_length: int,
        seed: int = 0,
        split: str = "train",
        isolate: bool = False,
    ) -> None:
        """Raise `UserError` when a source has no full window to train on, or none has anything to validate on."""
        self.sequence_length = sequence_length
        self._seed, self._is_train, self._isolate = seed, split == "train", isolate
        self._eos_id = sources[0][0].eos_id
        self._streams = [shards.split(split) for shards, _ in sources]
        self._sources = [shards for shards, _ in sources]
        full = 0 if self._is_train else sequence_length - 1  # a validation's last window may be partial
        self._windows = [max(stream.tokens - 1 + full, 0) // sequence_length for stream in self._streams]
        for (shards, weight), stream, windows in zip(sources, self._streams, self._windows, strict=True):
            if self._is_train and not 0 < weight < float("inf"):
                raise UserError(f"{shards.folder}: weight {weight}; give a number above 0")
            if self._is_train and not windows:
                raise UserError(
                    f"{shards.folder}: {stream.tokens:,} tokens to train on, fewer than one window of "
                    f"{sequence_length + 1:,}; add text or lower the sequence length"
                )
        if not sum(self._windows):
            folders = ", ".join(str(shards.folder) for shards, _ in sources)
            raise UserError(f"{folders}: nothing is held out to validate on; add documents or set val_fraction 0")
        self._shares = block_shares([weight for _, weight in sources]) if self._is_train else []

    def __len__(self) -> int:
        return sum(self._windows)

    @property
    def identity(self) -> str:
        """What the order of the windows depends on beside the seed."""
        sizes, shares = (":".join(map(str, values)) for values in (self._windows, self._shares))
        return f"{sizes} windows, shares {shares}"

    @property
    def content(self) -> str:
        """The same for the same documents of the same sources, those held out too."""
        return content_hash(shards.content for shards in self._sources)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source, window) of a sample."""
        if not self._is_train:
            source, window = 0, index % len(self)
            while window >= self._windows[source]:
                window -= self._windows[source]
                source += 1
            return source, window
        source, number = mixed(index, self._shares, self._seed)
        epoch, place = divmod(number, self._windows[source])
        return source, shuffled(place, self._windows[source], self._seed, source, epoch)

    def describe(self, index: int) -> str:
        """Return where a sample comes from: the shards, and which of their documents, counted from 0."""
        source, window = self.locate(index)
        stream, begin = self._streams[source], window * self.sequence_length
        first, last = map(stream.document_at, (begin, min(begin + self.sequence_length, stream.tokens - 1)))
        return f"{stream.folder} documents {first} to {last}"

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the samples of these indices."""
        length = self.sequence_length
        inputs = np.full((len(indices), length), self._eos_id, np.int64)
        labels = np.full((len(indices), length), IGNORED_LABEL, np.int64)
        padding = np.ones((len(indices), length), bool)
        for row, index in enumerate(indices):
            source, window = self.locate(index)
            stream = self._streams[source]
            tokens = stream.read(window * length, min((window + 1) * length + 1, stream.tokens))
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, : len(tokens) - 1] = tokens[1:]
            padding[row, : len(tokens) - 1] = False
        batch = {"input_ids": inputs, "labels": labels}
        if self._isolate:
            labels[inputs == self._eos_id] = IGNORED_LABEL
            batch |= _segments(inputs == self._eos_id)
            batch["segment_ids"][padding] = PADDING_SEGMENT
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def _segments(is_end: np.ndarray) -> dict[str, np.ndarray]:
    """Return segment_ids and position_ids, int64, from where documents end; all (samples, time)."""
    starts = np.zeros_like(is_end)
    starts[:, 1:] = is_end[:, :-1]
    times = np.broadcast_to(np.arange(is_end.shape[1]), is_end.shape)
    first = np.maximum.accumulate(np.where(starts, times, 0), axis=1)
    return {"segment_ids": np.cumsum(starts, axis=1, dtype=np.int64), "position_ids": times - first}
