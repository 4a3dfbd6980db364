"""RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.ops import rms_norm


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size). The mean square is taken in float32; the result has the type of x."""
        return rms_norm(x, self.weight, self.eps)
