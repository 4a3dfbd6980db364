"""The latent cache of a running batch: sequences of different lengths, each in its own slot."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from LMConfig import LMConfig
from model.attention import AttentionMask
from model.cache import LatentCache, send


class SlotCache(LatentCache):
    """Sequences of different lengths, each in its own slot from position 0.

    The slots in use are the first ones, in the order of a pass's rows; further rows, which fill it up, leave nothing.

    Attributes:
        used: slots in use; held: (slots,) int64 on the host, positions that each of them holds.
    """

    def __init__(
        self, config: LMConfig, slots: int, max_length: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__(config, slots, max_length, dtype, device)
        self.used = self._end = 0
        self.held = torch.zeros(slots, dtype=torch.int64)

    @property
    def end(self) -> int:
        return self._end

    def occupy(self, latents_LTC: Tensor) -> None:
        """Put a sequence of which every layer's latents are known, (layers, time, C), into the next free slot."""
        time = latents_LTC.shape[1]
        self.latents[:, self.used, :time] = latents_LTC
        self.held[self.used] = time
        self.used += 1

    def release(self, slot: int) -> None:
        """Free a slot: the last one in use moves into its place."""
        self.used -= 1
        if slot != self.used:
            time = int(self.held[self.used])
            self.latents[:, slot, :time] = self.latents[:, self.used, :time]
            self.held[slot] = time
        self.held[self.used] = 0

    def reserve_rows(self, layers: Iterable[int], batch: int, time: int) -> Tensor:
        start = self.held[:batch].clone()
        self._end = int(start.max()) + time
        if self._end > self.max_length:
            raise ValueError(f"latent cache: {self._end} positions, but only {self.max_length} were allocated")
        self.held[: self.used] += time
        return start

    def begin(self, batch: int, time: int) -> Tensor:
        start = self.reserve_rows((), batch, time)
        self._positions = send(start[:, None] + torch.arange(time), self.latents.device)
        return self._positions

    def mask(self, time: int) -> AttentionMask:
        return AttentionMask.up_to(self._positions, self._end)

    def append(self, layer: int, latent_BTC: Tensor) -> Tensor:
        batch = latent_BTC.shape[0]
        rows = torch.arange(batch, device=latent_BTC.device)[:, None]
        self.latents[layer, rows, self._positions] = latent_BTC.to(self.latents.dtype)
        return self.latents[layer, :batch, : self._end]
