"""The choice of what runs a model over a cache; and steps of one shape, which CUDA repeats as one graph.

At batch 1 a small model's step is hundreds of kernels of a few microseconds: starting them one by one takes the host
longer than the GPU computes. A graph starts them all at once.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.cache import LatentCache, StaticCache
from model.decoding.eager import EagerRunner, Step
from model.decoding.native import NativeRunner
from model.kernels.grouped import without_host

if TYPE_CHECKING:
    from model.transformer import MiniDeepSeek


def runner_for(model: MiniDeepSeek, cache: LatentCache, static: bool = False) -> EagerRunner:
    """Return what is fastest here. static: steps of one shape, on CUDA as a graph, where that can be."""
    device = cache.latents.device
    if static and fits_graph(model, cache.latents.dtype, device):
        return GraphRunner(model, cache)
    return NativeRunner(model, cache) if device.type == "cpu" else EagerRunner(model, cache)


def fits_graph(model: MiniDeepSeek, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a step in this type never waits for the device, which no graph holds; reported if it does."""
    moe = any(layer.is_moe for layer in model.model.layers)
    if device.type != "cuda" or not moe or without_host(dtype, device):
        return True
    kind, capability = str(dtype).removeprefix("torch."), ".".join(map(str, torch.cuda.get_device_capability(device)))
    waits = f"the experts' products in {kind} on compute capability {capability} wait for the device"
    _report(f"decoding without a CUDA graph: {waits}; those in bfloat16 on 9.x and 10.x do not")
    return False


@lru_cache
def _report(text: str) -> None:
    """Print a notice, once."""
    print(f"notice: {text}", file=sys.stderr)


class GraphRunner(EagerRunner):
    """Prefill as it comes, then steps of one token a row: the first records a graph on CUDA, and each replays it.

    Elsewhere the same steps run one operation after the other.
    """

    def __init__(self, model: MiniDeepSeek, cache: LatentCache) -> None:
        super().__init__(model, cache)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.ids: Tensor | None = None

    def step(self, ids: Tensor, last: int = 1) -> Step:
        """ids: (batch, 1)."""
        if self.ids is None:
            self.left = self.cache.max_length - self.cache.length
            self.cache, self.ids = StaticCache(self.cache), torch.zeros_like(ids)
        if not self.left:
            raise ValueError(f"latent cache: all of the {self.cache.max_length} positions allocated are taken")
        self.left -= 1
        self.ids.copy_(ids)
        if not (ids.is_cuda and torch.cuda.is_available()):
            return super().step(self.ids)
        if self.graph is None:
            self._record()
        self.graph.replay()
        return self.out

    def _record(self) -> None:
        start, side = self.cache.position.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            super().step(self.ids)  # libraries choose kernels and allocate at their first call, which no graph can hold
        torch.cuda.current_stream().wait_stream(side)
        self.cache.position.copy_(start)  # the position written by it is written again
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = super().step(self.ids)
