"""The latents of prompts that several completions continue: each prompt goes through the network once."""

from __future__ import annotations

import torch
from torch import Tensor

from model.cache import LatentCache


class PromptLatents(LatentCache):
    """The latents of prompts that several rows continue: a cache for training, through which gradients flow.

    `model(prompt_ids, cache=prompts)` fills it; `model(ids, cache=prompts.continued(of))` reads rows that continue the
    prompts `of`. A prompt is computed once, however many completions it has. padding: (prompts,) as in `LatentCache`.
    """

    decoding, counts_loads = False, False
    length = 0

    def __init__(self, padding: Tensor) -> None:
        self.padding, self.device = padding, padding.device
        self.latents: dict[int, Tensor] = {}

    def append(self, layer: int, latent_BTC: Tensor) -> Tensor:
        self.latents[layer] = latent_BTC
        return latent_BTC

    def continued(self, of: Tensor) -> ContinuedLatents:
        """of: (rows,) which prompt each row continues."""
        return ContinuedLatents(self, of)


class ContinuedLatents(PromptLatents):
    """What rows that continue prompts see of them."""

    def __init__(self, prompts: PromptLatents, of: Tensor) -> None:
        super().__init__(prompts.padding[of])
        self.latents, self.of, self.length = prompts.latents, of, prompts.latents[0].shape[1]

    def append(self, layer: int, latent_BTC: Tensor) -> Tensor:
        return torch.cat((self.latents[layer].index_select(0, self.of), latent_BTC), dim=1)
