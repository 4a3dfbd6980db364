"""Steps of decoding as CUDA graphs, each recorded once, then one launch.

At batch 1 a small model's step is hundreds of kernels of a few microseconds: starting them one by one takes the host
longer than the GPU computes. Shapes are few: rows come in powers of two from the engine, and the positions that they
see are rounded up to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.attention import AttentionMask
from model.cache import LatentCache, send
from model.decoding.eager import EagerRunner, Step

if TYPE_CHECKING:
    from model.transformer import MiniDeepSeek

SHORTEST = 256  # positions that a step sees at least; the next step of another shape sees twice as many


class GraphRunner(EagerRunner):
    """Prefill as it comes, then steps of one token a row, recorded for each number of rows and of positions seen.

    What a step gives is overwritten by the next one. Without CUDA the same steps run one operation after the other.
    """

    def __init__(self, model: MiniDeepSeek, cache: LatentCache) -> None:
        super().__init__(model, cache)
        self._steps: dict[tuple[int, int], RecordedStep] = {}
        self._latents: Tensor | None = None

    def step(self, ids: Tensor, last: int = 1) -> Step:
        rows, time = ids.shape
        if time > 1 or torch.is_grad_enabled() or rows > self.cache.latents.shape[1]:
            return super().step(ids, last)
        starts = self.cache.reserve_rows(range(self.model.config.num_hidden_layers), rows, 1)
        length = positions_seen(self.cache.end, self.cache.max_length)
        if self.cache.latents is not self._latents:
            self._prepare()
        if (rows, length) not in self._steps:
            seen = StaticCache(self.cache, self._starts[:rows], length)
            self._steps[rows, length] = RecordedStep(self.model, seen, self._ids[:rows], self._pool)
        self._starts[:rows].copy_(send(starts, self._starts.device))
        self._ids[:rows].copy_(send(ids, self._ids.device))
        return self._steps[rows, length]()

    def _prepare(self) -> None:
        """Forget what was recorded over memory that the cache has left; make what every step reads its inputs from."""
        self._latents, self._steps = self.cache.latents, {}
        device, rows = self._latents.device, self._latents.shape[1]
        self._pool = torch.cuda.graph_pool_handle() if recordable(device) else None
        with torch.inference_mode(False):  # to be written in any mode
            self._starts = torch.zeros(rows, dtype=torch.int64, device=device)
            self._ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)


class RecordedStep:
    """A step over tensors that stay where they are. The first time it runs as it comes, and libraries choose kernels
    and allocate, which no graph can hold; then it is recorded; then replayed."""

    def __init__(self, model: MiniDeepSeek, cache: StaticCache, ids: Tensor, pool: Any) -> None:
        self._plain, self._ids, self._pool = EagerRunner(model, cache), ids, pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._met = False

    def __call__(self) -> Step:
        if not self._met or not recordable(self._ids.device):
            self._met = True
            return self._plain.step(self._ids)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # Another thread, which saves or pins, may allocate meanwhile: only this one is held to the rules.
            record = torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local")
            with uncached_casts(), record:
                self._out = self._plain.step(self._ids)
        self._graph.replay()
        return self._out


class StaticCache(LatentCache):
    """The first rows and positions of a latent cache, in its memory, for steps of one position a row and of one shape.

    Where each row's position is, is a tensor, so that a graph can be repeated; those not yet written are masked.

    Attributes: starts: (rows,) int64, the position that a step writes.
    """

    def __init__(self, cache: LatentCache, starts: Tensor, length: int) -> None:
        rows = len(starts)
        self.latents, self.starts = cache.latents[:, :rows, :length], starts
        self.padding = None if cache.padding is None else cache.padding[:rows]
        self.places = torch.arange(length, device=starts.device)
        self.rows = torch.arange(rows, device=starts.device)

    def begin(self, batch: int, time: int) -> Tensor:
        return (self.starts if self.padding is None else self.starts - self.padding).unsqueeze(1)

    def mask(self, time: int) -> AttentionMask:
        allowed = self.places <= self.starts[:, None]
        if self.padding is not None:
            allowed &= self.places >= self.padding[:, None]
        return AttentionMask(allowed[:, None, None])

    def append(self, layer: int, latent_BTC: Tensor) -> Tensor:
        latents = self.latents[layer]
        latents[self.rows, self.starts] = latent_BTC.squeeze(1).to(latents.dtype)
        return latents


def positions_seen(needed: int, most: int) -> int:
    """Round up to `SHORTEST` times a power of two, and to `most` at most."""
    length = SHORTEST
    while length < needed:
        length *= 2
    return min(length, most)


def recordable(device: torch.device) -> bool:
    """Return whether this is a real CUDA device, not one of shapes alone."""
    return device.type == "cuda" and torch.cuda.is_available()


@contextmanager
def uncached_casts() -> Iterator[None]:
    """Leave casts of autocast inside the graph: kept outside, they would be freed while the graph still reads them."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
