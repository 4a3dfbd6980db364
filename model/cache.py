"""The latent cache: what MLA keeps of the past (DeepSeek-V3 section 2.1.1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from LMConfig import LMConfig


class LatentCache:
    """Of each layer and position the normalised latent c^KV and the rotated k^R: kv_lora_rank + rope numbers.

    Ordinary multi-head attention would keep heads * (qk + v) numbers.

    Args:
        config: the model's; the MTP layers get a cache too when `mtp` is set.
        batch: rows; max_length: positions allocated at once.
        padding: (batch,) number of left-padding positions of each row, or None.
    """

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
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.latents = torch.zeros(layers, batch, max_length, width, dtype=dtype, device=device)
        self.lengths = [0] * layers
        self.padding = padding
        self.decoders: dict[int, Any] = {}  # see model/native.py

    @property
    def length(self) -> int:
        """Positions that the main model's layers hold."""
        return self.lengths[0]

    @property
    def max_length(self) -> int:
        return self.latents.shape[2]

    @property
    def bytes_per_token(self) -> int:
        """Of all layers, for one position of one row."""
        return self.latents.shape[0] * self.latents.shape[3] * self.latents.element_size()

    def append(self, layer: int, latent_BTC: Tensor) -> Tensor:
        """Add the positions of one forward pass to one layer; returns all it holds, (batch, length, C)."""
        start = self.reserve([layer], latent_BTC.shape[1])
        end = self.lengths[layer]
        self.latents[layer, :, start:end] = latent_BTC
        return self.latents[layer, :, :end]

    def reserve(self, layers: Iterable[int], time: int) -> int:
        """Make room in layers of one length for positions that the caller writes; returns the first of them."""
        for layer in layers:
            start, end = self.lengths[layer], self.lengths[layer] + time
            if end > self.max_length:
                raise ValueError(f"latent cache: {end} positions, but only {self.max_length} were allocated")
            self.lengths[layer] = end
        return start

    def truncate(self, length: int, layer: int | None = None) -> None:
        """Forget every position from `length` on, in one layer or in all: drafts that did not come true."""
        for index in range(len(self.lengths)) if layer is None else [layer]:
            self.lengths[index] = min(self.lengths[index], length)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep the given rows of the batch (integers or bool), in this order."""
        self.latents = self.latents[:, rows]
        if self.padding is not None:
            self.padding = self.padding[rows]


def cache_dtype(model: nn.Module) -> torch.dtype:
    """What a cache should hold: the type that the network computes in, under autocast or without.

    On CPU float32 always: the small products of the absorbed form cost bfloat16's kernels more than they save.
    """
    weight = next(model.parameters())
    if weight.device.type == "cpu":
        return torch.float32
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
