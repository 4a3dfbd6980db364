"""A step of decoding whose shapes and places never change, so that CUDA can repeat it as one graph.

At batch 1 a small model's step is hundreds of kernels of a few microseconds: starting them one by one takes the host
longer than the GPU computes. A graph starts them all at once.
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor

from model.attention import AttentionMask
from model.cache import LatentCache
from model.kernels.grouped import without_host
from model.transformer import MiniDeepSeek, logits


class StaticCache(LatentCache):
    """A latent cache that goes on from a filled one, in its memory; where the next position is, is a tensor.

    Every step attends to all positions allocated, those not yet written behind a mask.
    """

    def __init__(self, filled: LatentCache) -> None:
        self.latents, self.padding, self.absorbed = filled.latents, filled.padding, filled.absorbed
        self.position = torch.full((1,), filled.length, device=self.latents.device)
        places = torch.arange(self.max_length, device=self.latents.device)
        first = torch.zeros(1, dtype=torch.long, device=places.device) if self.padding is None else self.padding
        self.is_token = places >= first[:, None]
        self.places = places

    def append(self, layer: int, latent_BTC: Tensor) -> Tensor:
        """Write the one new position of a layer; returns all that is allocated, (batch, max_length, C)."""
        self.latents[layer].index_copy_(1, self.position, latent_BTC.to(self.latents.dtype))
        return self.latents[layer]

    def attention_mask(self) -> AttentionMask:
        """Real positions up to the one that is being written."""
        return AttentionMask((self.is_token & (self.places <= self.position))[:, None, None])

    def positions(self) -> Tensor:
        """(batch or 1, 1) for RoPE, counted without padding."""
        return self.position[None] if self.padding is None else self.position - self.padding[:, None]


def fits_graph(model: MiniDeepSeek, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a step in this type never waits for the device, which a CUDA graph cannot hold; reported if it does."""
    moe = any(layer.is_moe for layer in model.model.layers)
    if device.type != "cuda" or not moe or without_host(dtype, device):
        return True
    kind, capability = str(dtype).removeprefix("torch."), ".".join(map(str, torch.cuda.get_device_capability(device)))
    _report(
        f"decoding without a CUDA graph: the experts' products in {kind} on compute capability {capability} wait "
        "for the device; those in bfloat16 on 9.x and 10.x do not"
    )
    return False


@lru_cache
def _report(text: str) -> None:
    """Print a notice, once."""
    print(f"notice: {text}", file=sys.stderr)


class StaticStep:
    """`step(ids)`: logits of the token after these, (batch, vocab) float32, as plain decoding gives them.

    On CUDA the first call records a graph and every call replays it; elsewhere the same step runs as it is.

    Args:
        cache: holds what came before, with room for what comes; it is used up.
    """

    def __init__(self, model: MiniDeepSeek, cache: LatentCache) -> None:
        self.model, self.cache, self.left = model, StaticCache(cache), cache.max_length - cache.length
        self.ids = torch.zeros(self.cache.latents.shape[1], 1, dtype=torch.long, device=self.cache.latents.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: (batch, 1)."""
        if not self.left:
            raise ValueError(f"latent cache: all of the {self.cache.max_length} positions allocated are taken")
        self.left -= 1
        self.ids.copy_(ids)
        if not (self.ids.is_cuda and torch.cuda.is_available()):
            self._run()
        else:
            if self.graph is None:
                self._record()
            self.graph.replay()
        return self.out

    def _run(self) -> None:
        out = self.model(self.ids, position_ids=self.cache.positions(), cache=self.cache)
        self.out = logits(out.hidden[:, -1], out.head)
        self.cache.position += 1

    def _record(self) -> None:
        start, side = self.cache.position.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()  # libraries choose kernels and allocate at their first call, which a graph cannot hold
        torch.cuda.current_stream().wait_stream(side)
        self.cache.position.copy_(start)  # the position written by it is written again
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()
