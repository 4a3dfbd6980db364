"""Muon for the matrices inside the layers, AdamW for the rest (Jordan et al. 2024; Liu et al. 2025)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from model import MiniDeepSeek
from model.experts import Experts

# A quintic whose iteration drives every singular value into about [0.7, 1.2] (Jordan et al. 2024).
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
MATCH_ADAMW = 0.2  # root mean square of AdamW's usual update: one learning rate serves both (Liu et al. 2025, Eq. 4)


class Muon(torch.optim.AdamW):
    """Momentum, then the nearest semi-orthogonal matrix instead of the gradient's own scale; no second moment.

    Args:
        matrices: stacked or single, each with its number of blocks along the next to last axis: gate and up are two.
        others: AdamW's groups, as `torch.optim.AdamW` takes them.
        momentum: Nesterov's.
    """

    def __init__(
        self, matrices: Iterable[tuple[nn.Parameter, int]], others: list[dict], momentum: float, **adamw
    ) -> None:
        super().__init__(others, **adamw)
        self.blocks = dict(matrices)
        defaults = {**self.defaults, "momentum": momentum}
        self.muon = {"params": list(self.blocks), **defaults}
        self.param_groups.append(self.muon)

    @torch.no_grad()
    def step(self, closure=None):
        """AdamW over its groups, then Muon over the matrices."""
        self.param_groups.remove(self.muon)
        try:
            super().step(closure)
        finally:
            self.param_groups.append(self.muon)
        # Matrices of one shape are made orthogonal together: few large products instead of many small ones.
        same: dict[tuple, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for p in self.muon["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - self.muon["momentum"])
            update = p.grad.lerp(state["momentum"], self.muon["momentum"])
            matrices = update.unflatten(-2, (self.blocks[p], -1)).flatten(0, -3)
            same[matrices.shape[1:]].append((p, matrices))
        for members in same.values():
            stacked = orthogonal(torch.cat([matrices for _, matrices in members]))
            scale = MATCH_ADAMW * max(stacked.shape[-2:]) ** 0.5
            for (p, _), update in zip(members, stacked.split([len(m) for _, m in members]), strict=True):
                p.mul_(1 - self.muon["lr"] * self.muon["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-self.muon["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of each U S V^T, by Newton-Schulz iterations. matrices: (count, rows, columns)."""
    x = matrices.bfloat16() if matrices.device.type in ("cpu", "cuda") else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.mT if tall else x).to(matrices.dtype)


def inner_matrices(model: MiniDeepSeek) -> list[tuple[nn.Parameter, int]]:
    """The weights of all linear maps inside the layers, with the number of maps that are stacked in each."""
    found = []
    for layer in [*model.model.layers, *model.mtp]:
        for module in layer.modules():
            if isinstance(module, Experts):
                found += [(module.gate_up_proj, 2), (module.down_proj, 1)]
            elif isinstance(module, nn.Linear):
                found.append((module.weight, 1))
    return [(p, blocks) for p, blocks in found if p.requires_grad]
