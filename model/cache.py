"""The latent cache: what MLA keeps of the past (DeepSeek-V3 section 2.1.1)."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Protocol

import torch
from torch import Tensor, nn

from LMConfig import LMConfig
from model.attention import AttentionMask


class Cache(Protocol):
    """What a forward pass asks of the positions before its own.

    Attributes:
        decoding: without gradients, so attention may read the latents without expanding them.
        counts_loads: the tokens of the pass count in the experts' loads.
    """

    decoding: bool
    counts_loads: bool

    def begin(self, batch: int, time: int) -> Tensor:
        """Open a pass over `time` new positions of each row; return them for RoPE, (batch or 1, time)."""

    def mask(self, time: int) -> AttentionMask:
        """Return which positions those of the open pass attend to."""

    def append(self, layer: int, latent_BTC: Tensor) -> Tensor:
        """Add the pass's latents of one layer; return all that the layer attends to, (batch, positions, C)."""


class LatentCache:
    """Of each layer and position the normalised latent c^KV and the rotated k^R: kv_lora_rank + rope numbers.

    Ordinary multi-head attention caches heads * (qk + v) numbers, and does so here too (`model.variants`).

    Args:
        batch: rows; max_length: positions allocated at once; mtp: for the MTP layers too.
        padding: (batch,) number of left-padding positions of each row, or None.
    """

    decoding, counts_loads = True, False

    def __init__(
        self,
        config: LMConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str,
        padding: Tensor | None = None,
        mtp: bool = False,
    ) -> None:
        layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
        self.latents = torch.zeros(layers, batch, max_length, config.cache_width, dtype=dtype, device=device)
        self.device, self.lengths = self.latents.device, [0] * layers
        self.padding = None if padding is None else padding.long()

    @property
    def length(self) -> int:
        """Positions that the main model's layers hold."""
        return self.lengths[0]

    @property
    def end(self) -> int:
        """One past the last position that any row of the open pass sees."""
        return self.length

    @property
    def max_length(self) -> int:
        return self.latents.shape[2]

    def begin(self, batch: int, time: int) -> Tensor:
        places = torch.arange(self.length, self.length + time, device=self.device)  # counted from a row's first token
        return places[None] if self.padding is None else (places - self.padding[:, None]).clamp(min=0)

    def mask(self, time: int) -> AttentionMask:
        if self.padding is None:
            return AttentionMask()
        return AttentionMask.left_padded(time, self.length + time, self.padding)

    def append(self, layer: int, latent_BTC: Tensor) -> Tensor:
        start = self.reserve([layer], latent_BTC.shape[1])
        end = self.lengths[layer]
        self.latents[layer, :, start:end] = latent_BTC
        return self.latents[layer, :, :end]

    def reserve(self, layers: Iterable[int], time: int) -> int:
        """Make room in layers of one length for positions that the caller writes; return the first of them."""
        for layer in layers:
            start, end = self.lengths[layer], self.lengths[layer] + time
            if end > self.max_length:
                raise ValueError(f"latent cache: {end} positions, but only {self.max_length} were allocated")
            self.lengths[layer] = end
        return start

    def reserve_rows(self, layers: Iterable[int], batch: int, time: int) -> Tensor:
        """The same for each row of a batch: (batch,) int64 on the host."""
        return torch.full((batch,), self.reserve(layers, time))

    def part(self, rows: slice) -> LatentCache:
        """Return some rows as a separate cache in the same memory; its lengths change alone from here on."""
        part = copy(self)
        part.latents, part.lengths = self.latents[:, rows], list(self.lengths)
        part.padding = None if self.padding is None else self.padding[rows]
        return part

    def truncate(self, length: int, layer: int | None = None) -> None:
        """Forget every position from `length` on, in one layer or in all: drafts that were rejected."""
        for index in range(len(self.lengths)) if layer is None else [layer]:
            self.lengths[index] = min(self.lengths[index], length)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep the given rows of the batch (integers or bool), in this order."""
        self.latents = self.latents[:, rows]
        if self.padding is not None:
            self.padding = self.padding[rows]


def cache_dtype(model: nn.Module) -> torch.dtype:
    """Return what a cache should hold: the type that the network computes in; on CPU that of the weights."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" and torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; from the host's memory without a wait, as a copy from pageable memory would be."""
    if device.type != "cuda" or x.device.type == "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
