"""AdamW whose moments are kept in bfloat16, as DeepSeek-V3 keeps them (section 3.3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import model.kernels as kernels
from model.kernels import fused

TOGETHER = 2**26  # numbers that are updated at a time on CUDA


class AdamWBF16(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) with 8 bytes a float32 weight and its moments instead of 12.

    Moments are brought to float32, moved, used, and rounded to the nearest bfloat16 only to be kept. A moment moves
    while a step changes it by more than 0.4 %, so rates of decay near 1 (0.999) would hold it still; 0.9 and 0.95, the
    paper's, do not.

    Args: as those of torch.optim.AdamW.
    """

    moment_dtype = torch.bfloat16
    counts_on_host = True  # of updates: of a GPU each would have to be waited for

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
            together: dict[float, list[Tensor]] = {}  # parameters by how often they were updated
            for p in group["params"]:
                if p.grad is None:
                    continue
                count = self._counted(p)
                if kernels.on_cuda(p):
                    together.setdefault(count, []).append(p)
                else:
                    self._update(p, count, group)
            for count, members in together.items():
                for some in in_parts(members):
                    self._update_together(some, count, group)

    def _counted(self, p: Tensor) -> float:
        """Count an update, on the host."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=self.moment_dtype) for _ in range(2))
        state["step"] += 1
        return state["step"].item()

    def _update(self, p: Tensor, count: float, group: dict[str, Any]) -> None:
        tensors = (p, p.grad, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"])
        whole = all(x.is_contiguous() for x in tensors) and p.dtype == p.grad.dtype == torch.float32
        if whole and fused.available(tensors[2]):
            fused.adamw_(*tensors, *numbers(group, count))
        else:
            plain_adamw_(*tensors, *numbers(group, count))

    def _update_together(self, parameters: list[Tensor], count: float, group: dict[str, Any]) -> None:
        """Do what `plain_adamw_` does, in a few launches for all of them."""
        gradients = [p.grad for p in parameters]
        moments = [[self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq")]
        beta1, beta2, eps, keep, lr, correction = numbers(group, count)
        m, v = ([torch.empty_like(p, dtype=torch.float32) for p in parameters] for _ in moments)
        torch._foreach_copy_(m, moments[0])
        torch._foreach_copy_(v, moments[1])
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, value=1 - beta2)
        torch._foreach_copy_(moments[0], m)
        torch._foreach_copy_(moments[1], v)
        torch._foreach_sqrt_(v)
        torch._foreach_mul_(v, correction)
        torch._foreach_add_(v, eps)
        torch._foreach_mul_(parameters, keep)
        torch._foreach_addcdiv_(parameters, m, v, value=-lr)


def numbers(group: dict[str, Any], count: float) -> tuple[float, float, float, float, float, float]:
    """Return those of `plain_adamw_` for the update number `count`."""
    # p <- (1 - lr wd) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    rates = (1 - lr * group["weight_decay"], lr / (1 - beta1**count), (1 - beta2**count) ** -0.5)
    return beta1, beta2, group["eps"], *rates


def in_parts(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield parameters of at most `TOGETHER` numbers at a time, or one: their moments in float32 are held at once."""
    some: list[Tensor] = []
    for p in parameters:
        if some and sum(x.numel() for x in (*some, p)) > TOGETHER:
            yield some
            some = []
        some.append(p)
    yield some


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
