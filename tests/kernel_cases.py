"""What tests of kernels share: random tensors, a distance, and a training step."""

from __future__ import annotations

import torch
from torch import Tensor

from LMConfig import LMConfig
from model import MiniDeepSeek
from training.losses import NextTokenLoss

TYPES = (torch.float32, torch.bfloat16)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def far(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor) -> Tensor:
    """softmax(q k^T * scale) v in plain operations; allowed: bool, broadcastable to (batch, heads, queries, keys)."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


def training_step(config: LMConfig, dtype: torch.dtype, time: int = 65) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a new model."""
    tokens = torch.randint(0, config.vocab_size, (2, time), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = MiniDeepSeek(config)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        total, count, _ = NextTokenLoss()(model, {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]})
    (total / count).backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters()}
