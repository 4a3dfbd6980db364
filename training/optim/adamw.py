"""AdamW whose moments are kept in bfloat16, as DeepSeek-V3 keeps them (section 3.3.3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from model.kernels import fused


class AdamWBF16(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) with 8 bytes a float32 weight and its moments instead of 12.

    Moments are brought to float32, moved, used, and rounded to the nearest bfloat16 only to be kept. A moment moves
    while a step changes it by more than 0.4 %, so rates of decay near 1 (0.999) would hold it still; 0.9 and 0.95, the
    paper's, do not.

    Args: as those of torch.optim.AdamW.
    """

    moment_dtype = torch.bfloat16

    def __init__(
        self,
        groups: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights that have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=self.moment_dtype) for _ in range(2))
        state["step"] += 1
        moments, (beta1, beta2) = (state["exp_avg"], state["exp_avg_sq"]), group["betas"]
        # p <- (1 - lr wd) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
        count, lr = state["step"].item(), float(group["lr"])
        rates = (1 - lr * group["weight_decay"], lr / (1 - beta1**count), (1 - beta2**count) ** -0.5)
        tensors = (p, p.grad, *moments)
        whole = all(x.is_contiguous() for x in tensors) and p.dtype == p.grad.dtype == torch.float32
        if whole and fused.available(moments[0]):
            fused.adamw_(*tensors, beta1, beta2, group["eps"], *rates)
        else:
            plain_adamw_(*tensors, beta1, beta2, group["eps"], *rates)


def plain_adamw_(
    p: Tensor, grad: Tensor, first: Tensor, second: Tensor, beta1: float, beta2: float, eps: float,
    keep: float, lr: float, correction: float,
) -> None:  # fmt: skip
    """Do what `model.kernels.fused.adamw_` does, in PyTorch operations."""
    m, v = first.float(), second.float()
    m.lerp_(grad.float(), 1 - beta1)
    v.mul_(beta2).addcmul_(grad.float(), grad.float(), value=1 - beta2)
    first.copy_(m)
    second.copy_(v)
    p.mul_(keep).addcdiv_(m, v.sqrt_().mul_(correction).add_(eps), value=-lr)
