"""The latent cache: what MLA keeps of the past (DeepSeek-V3 section 2.1.1)."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
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

    While one is in use the weights stay as they are, and where they are: what is prepared of them is kept beside it.
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
        self.padding = None if padding is None else padding.long()
        self.decoders: dict[int, Any] = {}  # see model/decoding/native.py
        self.steppers: dict[int, Any] = {}  # see model/decoding/stepper.py
        self.absorbed: dict[int, tuple[Tensor, Tensor]] = {}  # of each layer, see model/mla.py

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

    def reserve_rows(self, layers: Iterable[int], batch: int, time: int) -> Tensor:
        """The same for each row of a batch: (batch,) int64 on the host."""
        return torch.full((batch,), self.reserve(layers, time))

    def part(self, rows: slice) -> LatentCache:
        """Some rows as a cache of their own, in the same memory; its lengths are its own from here on."""
        part = copy(self)
        part.latents, part.lengths = self.latents[:, rows], list(self.lengths)
        part.decoders, part.steppers = {}, {}
        part.padding = None if self.padding is None else self.padding[rows]
        return part

    def truncate(self, length: int, layer: int | None = None) -> None:
        """Forget every position from `length` on, in one layer or in all: drafts that did not come true."""
        for index in range(len(self.lengths)) if layer is None else [layer]:
            self.lengths[index] = min(self.lengths[index], length)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep the given rows of the batch (integers or bool), in this order."""
        self.latents = self.latents[:, rows]
        if self.padding is not None:
            self.padding = self.padding[rows]


class SlotCache(LatentCache):
    """Sequences of different lengths, each in a slot of its own from position 0: for `model.decoding.engine`.

    The slots in use are the first ones, in the order of the rows of a pass. `begin`, then `model(ids, cache=slots)`
    takes one row for each of them; further rows, which fill a batch up, leave nothing behind.

    Args:
        slots: sequences at once; max_length: most positions of one.
    Attributes:
        used: slots in use; held: (slots,) int64 on the host, positions that each of them holds.
    """

    def __init__(
        self, config: LMConfig, slots: int, max_length: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__(config, slots, max_length, dtype, device)
        self.used = 0
        self.held = torch.zeros(slots, dtype=torch.int64)

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

    def begin(self, batch: int, time: int) -> None:
        """Make room for the next pass, over all layers; `positions` are those of its tokens, (batch, time)."""
        self.start = self.held[:batch].clone()
        self.end = int(self.start.max()) + time
        if self.end > self.max_length:
            raise ValueError(f"latent cache: {self.end} positions, but only {self.max_length} were allocated")
        self.held[: self.used] += time
        self.positions = (self.start[:, None] + torch.arange(time)).to(self.latents.device)

    def append(self, layer: int, latent_BTC: Tensor) -> Tensor:
        """Write the positions of this pass; returns (batch, longest, C), of which each row sees up to its own ones."""
        batch = latent_BTC.shape[0]
        rows = torch.arange(batch, device=latent_BTC.device)[:, None]
        self.latents[layer, rows, self.positions] = latent_BTC.to(self.latents.dtype)
        return self.latents[layer, :batch, : self.end]

    def reserve_rows(self, layers: Iterable[int], batch: int, time: int) -> Tensor:
        return self.start


class PromptLatents:
    """The latents of prompts that several rows go on from: a cache for training, through which gradients flow.

    `model(prompt_ids, cache=prompts)` fills it; `model(ids, cache=prompts.continued(of))` reads rows that continue the
    prompts `of`. A prompt is computed once, however many completions it has.

    Args:
        padding: (prompts,) number of left-padding positions of each.
    """

    def __init__(self, padding: Tensor) -> None:
        self.padding = padding
        self.latents: dict[int, Tensor] = {}
        self.length = 0

    def append(self, layer: int, latent_BTC: Tensor) -> Tensor:
        self.latents[layer] = latent_BTC
        return latent_BTC

    def continued(self, of: Tensor) -> ContinuedLatents:
        """of: (rows,) which prompt each row continues."""
        return ContinuedLatents(self.latents, self.padding, of)


class ContinuedLatents:
    """What rows that continue prompts see of them; see `PromptLatents`."""

    def __init__(self, latents: dict[int, Tensor], padding: Tensor, of: Tensor) -> None:
        self.latents, self.of = latents, of
        self.padding = padding[of]
        self.length = latents[0].shape[1]

    def append(self, layer: int, latent_BTC: Tensor) -> Tensor:
        return torch.cat((self.latents[layer].index_select(0, self.of), latent_BTC), dim=1)


class OwnStep:
    """One step of an MTP layer in training on its own state, as `model.decoding.speculative` chains it: see `MTPLayer`.

    Step 1 is the layer's ordinary pass. In step j, position u stands for a draft whose chain began at u - (j-1): of the
    positions up to there the layer sees the latents of step 1, then of each following one that of the next step.

    Args:
        latents: of the steps before; this one's are added to it.
        step: j, from 1.
    """

    def __init__(self, latents: dict[int, Tensor], step: int) -> None:
        self.latents, self.step = latents, step

    def append(self, layer: int, latent_BTC: Tensor) -> Tensor:
        """(batch, j time, C): the latents of each step, one step behind the other."""
        self.latents[self.step] = latent_BTC  # by number: recomputation of activations comes here twice
        return torch.cat([self.latents[step] for step in range(1, self.step + 1)], dim=1)

    def allowed(self, time: int, segment_ids: Tensor | None, device: torch.device) -> Tensor:
        """(batch or 1, 1, time, j time) bool: which of them each position sees; j is 2 or more."""
        behind = torch.arange(time, device=device)[:, None] - torch.arange(time, device=device)
        first = behind >= self.step - 1
        chain = [behind == self.step - step for step in range(2, self.step + 1)]
        if segment_ids is None:
            return torch.cat((first, *chain), dim=1)[None, None]
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        return torch.cat((first & same, *(part.expand_as(same) for part in chain)), dim=2)[:, None]


Cache = LatentCache | PromptLatents | ContinuedLatents | OwnStep


def cache_dtype(model: nn.Module) -> torch.dtype:
    """What a cache should hold: the type that the network computes in, under autocast or without.

    On CPU the type of the weights: decoding computes with them as they are.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" and torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
