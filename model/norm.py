"""RMSNorm, and the buffers that stay in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import fused


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size). The mean square is taken in float32; the result has the type of x."""
        if type(self.weight) is nn.Parameter and fused.fits(x):
            return fused.FusedRMSNorm.apply(x, self.weight.float(), self.eps)
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # goes through float32 by itself
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def float32_only(device: torch.device) -> AbstractContextManager:
    """Autocast off; entering its context costs more than a small product, so only where it is on."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


class Float32Buffers(nn.Module):
    """A module whose own buffers keep float32 through `.to(dtype)`, `.bfloat16()` and the like.

    The router's bias moves by gamma = 1e-3 a step and RoPE's angles reach thousands of radians: bfloat16 holds neither.
    """

    def _apply(self, fn, recurse: bool = True):  # type: ignore[override]
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
