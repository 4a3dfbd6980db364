"""Prefill: prompts into a latent cache, and the state that their first new token comes from."""

from __future__ import annotations

import torch
from torch import Tensor

from model.cache import LatentCache
from model.transformer import MiniDeepSeek

TOKENS = 4096  # in one pass: with more, memory that is always new costs more than larger products save


def prefill(model: MiniDeepSeek, input_ids: Tensor, cache: LatentCache, last_positions: Tensor | None = None) -> Tensor:
    """Read prompts, some rows at a time.

    Args:
        input_ids: (batch, time). cache: of as many rows; the positions are added to it.
        last_positions: (batch,) the last token of each row; by default that of the last column.
    Returns:
        (batch, hidden) after the final norm, of those tokens.
    """
    batch, time = input_ids.shape
    if last_positions is None:
        last_positions = torch.full((batch,), time - 1, device=input_ids.device)
    hidden, at_once = [], max(TOKENS // time, 1)
    for start in range(0, batch, at_once):
        rows = slice(start, start + at_once)
        out = model(input_ids[rows], cache=cache.part(rows), last_positions=last_positions[rows])
        hidden.append(out.hidden.squeeze(1))
    cache.reserve(range(model.config.num_hidden_layers), time)
    return torch.cat(hidden)
