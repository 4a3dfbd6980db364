"""The papers' divergences, word for word, over probabilities; what the tests compare with."""

from __future__ import annotations

import torch

from training.distill.distillation import DistillationSettings
from training.distill.divergences import Divergence


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p.log() - q.log())).sum(-1)


NAIVE = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "skewed_forward_kl": lambda p, q, a=0.3: kl(p, a * p + (1 - a) * q),
    "skewed_reverse_kl": lambda p, q, a=0.3: kl(q, (1 - a) * p + a * q),
    "jsd": lambda p, q, b=0.2: b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q),
}


def divergence(name: str) -> Divergence:
    """Ours, with the same lambda and beta."""
    return DistillationSettings(loss=name, skew=0.3, beta=0.2).divergence
