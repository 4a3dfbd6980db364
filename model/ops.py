"""The one door to fast kernels: each operation is the plain PyTorch line, and the kernel where it applies."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from model.kernels import decode


def head_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden (..., hidden) after a norm, head (vocab, hidden) -> (..., vocab) float32."""
    if decode.projects(hidden, head):
        return decode.project(hidden, head, head.dtype)
    return F.linear(hidden, head.to(hidden.dtype)).float()
