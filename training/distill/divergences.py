"""How far a student's distribution q over the vocabulary is from the teacher's p: divergences and their gradients.

Each takes log p and log q, (rows, events) float32 whose exponentials add up to 1 in each row, and returns

    value (rows,)          D in nats
    flow  (rows, events)   q * dD/dq, in a form that stays finite where q is 0

A softmax turns the second into the gradient of the student's logits: dD/dz = flow - q * sum(flow).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q): the student must cover all that the teacher might say (Hinton et al. 2015)."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), -p


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p): the student must not say what the teacher would not (MiniLLM, Gu et al. 2024)."""
    q, ratio = log_q.exp(), log_q - log_p
    return (q * ratio).sum(-1), q * (ratio + 1)


def skewed_forward_kl(log_p: Tensor, log_q: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL(p || lambda p + (1 - lambda) q) (DistiLLM, Ko et al. 2024, Eq. 3): forward KL at lambda 0, nothing at 1.

    The ratio p / m is at most 1 / lambda, so no token that the student holds for impossible tears at its weights.
    """
    p, log_m = log_p.exp(), mixture(log_p, log_q, skew)
    return (p * (log_p - log_m)).sum(-1), -(1 - skew) * (log_p + log_q - log_m).exp()


def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL(q || (1 - lambda) p + lambda q) (DistiLLM, section 3.1): reverse KL at lambda 0, nothing at 1."""
    q, log_m = log_q.exp(), mixture(log_q, log_p, skew)
    ratio = log_q - log_m
    return (q * ratio).sum(-1), q * (ratio + 1 - skew * ratio.exp())


def generalised_jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, Agarwal et al. 2024, Eq. 1).

    At 0.5 the Jensen-Shannon divergence. Over beta it tends to forward KL as beta falls to 0, over 1 - beta to reverse
    KL as beta rises to 1.
    """
    p, q, log_m = log_p.exp(), log_q.exp(), mixture(log_p, log_q, beta)
    from_p, from_q = log_p - log_m, log_q - log_m
    value = (beta * p * from_p + (1 - beta) * q * from_q).sum(-1)
    # d/dq of the first term is -beta (1-beta) p/m, of the second (1-beta) (log(q/m) + 1 - (1-beta) q/m); what has no
    # logarithm adds up to 0, for beta p/m + (1-beta) q/m = 1.
    return value, (1 - beta) * q * from_q


def mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b)."""
    if share in (0, 1):
        return log_a if share else log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log(1 - share))


def logit_gradient(log_q: Tensor, flow: Tensor) -> Tensor:
    """dD/dz of the logits z that q is the softmax of; `flow` is overwritten."""
    return flow.sub_(log_q.exp().mul_(flow.sum(-1, keepdim=True)))
