"""Muon: momentum made orthogonal, for matrices; AdamW for everything else (Jordan et al. 2024; Liu et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from training.machine import has_bf16_units

# The quintic whose slope at 0 is steepest: after 5 steps all singular values are between 0.7 and 1.2 (Jordan et al.).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7
# Root mean square of a typical AdamW update (Liu et al. 2025, section 2.2): one learning rate suits both.
ADAMW_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """One optimiser over two kinds of groups, distinguished by their `parts`.

    Groups with `parts` above 0 hold matrices, or stacks of them (..., rows, columns), each matrix updated for itself:
    M <- mu M + (1 - mu) G;  W <- (1 - lr wd) W - 0.2 sqrt(max(rows, columns)) lr NS((1 - mu) G + mu M).
    `parts` counts the matrices that stand one above the other in each (gate and up: 2). All other groups are AdamW's.
    Gradients must be those of all ranks, as after DDP; each rank then does the same.

    Args:
        groups: as of any optimiser. momentum: mu. The rest is AdamW's, `lr` and `weight_decay` Muon's too.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum)
        groups = [{"parts": 0, **group} for group in groups]
        own, rest = ([group for group in groups if bool(group["parts"]) is muon] for muon in (True, False))
        self._adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, fused=True) if rest else None
        # AdamW's groups carry what its step asks for, `fused` among it.
        super().__init__([*own, *(self._adamw.param_groups if self._adamw else [])], defaults)

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights that have a gradient."""
        for group in self.param_groups:
            if group["parts"]:
                self._update(group)
        if self._adamw is not None:
            # The state and the rates are kept in one place, here.
            self._adamw.state = self.state
            self._adamw.param_groups = [group for group in self.param_groups if not group["parts"]]
            self._adamw.step()

    def _update(self, group: dict[str, Any]) -> None:
        """Matrices of one size, of whatever layers, go through Newton-Schulz together: few products, and large ones."""
        lr, momentum = float(group["lr"]), group["momentum"]
        by_size: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            direction = p.grad.lerp(state["momentum_buffer"], momentum)  # Nesterov's: looks one step ahead
            weight_BMN, direction_BMN = (_matrices(x, group["parts"]) for x in (p, direction))
            rows, columns = weight_BMN.shape[-2:]
            if rows > columns:  # the smaller side is the one that is squared
                weight_BMN, direction_BMN = weight_BMN.mT, direction_BMN.mT
            by_size.setdefault(tuple(weight_BMN.shape[-2:]), []).append((weight_BMN, direction_BMN))
        for (_, longer), pairs in by_size.items():
            updates = orthogonal(torch.cat([direction for _, direction in pairs]))
            updates = updates.split([len(weight) for weight, _ in pairs])
            for (weight_BMN, _), update_BMN in zip(pairs, updates, strict=True):
                weight_BMN.mul_(1 - lr * group["weight_decay"])
                weight_BMN.add_(update_BMN, alpha=-ADAMW_RMS * longer**0.5 * lr)


def orthogonal(x_BMN: Tensor) -> Tensor:
    """Newton-Schulz: each matrix U S V^T becomes about U V^T. (B, M, N) with M <= N, returned in the type it ran in.

    x <- a x + b (x x^T) x + c (x x^T)^2 x; in bfloat16 where there are units for it, which is precise enough.
    """
    a, b, c = COEFFICIENTS
    x_BMN = x_BMN.to(torch.bfloat16 if has_bf16_units(x_BMN.device) else torch.float32)
    x_BMN = x_BMN / torch.linalg.vector_norm(x_BMN, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram_BMM = torch.bmm(x_BMN, x_BMN.mT)
        polynomial_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
        x_BMN = torch.baddbmm(x_BMN, polynomial_BMM, x_BMN, beta=a)
    return x_BMN


def _matrices(x: Tensor, parts: int) -> Tensor:
    """(..., rows, columns) as a stack (B, rows / parts, columns), without a copy."""
    return x.view(-1, x.shape[-2] // parts, x.shape[-1])
