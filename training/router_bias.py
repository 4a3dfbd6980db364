"""The router's bias is updated here: balance without an auxiliary loss (DeepSeek-V3 section 2.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from model import MiniDeepSeek


def update_router_biases(model: MiniDeepSeek, counts_LE: Tensor | None, speed: float) -> None:
    """Move the bias of every router, MTP's too, once an optimiser step. counts_LE: see `update_bias`, a row a layer."""
    if counts_LE is not None and speed:
        for router, counts_E in zip(model.routers(), counts_LE, strict=False):
            update_bias(router.e_score_correction_bias, counts_E, speed)


@torch.no_grad()
def update_bias(bias_E: Tensor, counts_E: Tensor, speed: float) -> None:
    """b_i += gamma * sign(mean load - load_i), in place; gamma is `speed`.

    Args:
        bias_E: the router's buffer; counts_E: loads of the whole step, summed over micro-batches and ranks.
    """
    counts = counts_E.to(bias_E)
    bias_E += speed * torch.sign(counts.mean() - counts)
