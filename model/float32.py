"""What stays in float32 whatever the rest of the network computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


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
