"""The optimiser: AdamW as DeepSeek-V3 uses it (section 4.2), or Muon for the matrices inside the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pkgutil import resolve_name

import torch
from torch import nn

import model.kernels as kernels
from errors import UserError, quiet_compiler, quiet_imports

KINDS = ("adamw", "adamw_bf16", "adamw8bit", "paged_adamw8bit", "muon")
# Matrices that Muon leaves to AdamW: rows that are looked up or chosen by, one token or expert each.
LOOKED_UP = ("embed_tokens", "lm_head", "mlp.gate.")
SLOWEST = 0.99  # rate of decay with which a moment in bfloat16 still follows: one unit in its last place is 0.8 %
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
NO_RATIOS: Mapping[str, float] = {}


@dataclass
class OptimSettings:
    """Optimiser and learning-rate schedule.

    Args:
        lr: peak learning rate.
        final_lr_ratio: last learning rate over the peak.
        warmup: share of the run with a linear warm-up.
        decay_from: share of the run from which the learning rate falls along a cosine.
        tails: constant rates after the cosine, {share of the run: rate over the peak}; the first share ends the cosine.
            DeepSeek-V3: {"0.966": 0.1, "0.989": 0.0332}.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        weight_decay: on matrices only; norms, embeddings' biases and the router bias have none.
        clip: largest norm of the gradient; a very large one never clips.
        kind: adamw, or with moments in bfloat16 (section 3.3.3) adamw_bf16, or with moments in 8 bits adamw8bit
            (torchao; compiles for some seconds) and paged_adamw8bit (bitsandbytes, on CUDA); or muon: orthogonalised
            momentum for the matrices inside the layers, scaled so that the learning rate and the weight decay of AdamW
            suit it, and AdamW for embedding, head, router and norms.
        momentum: Muon's.
        adamw_lr_ratio: learning rate over lr of what Muon leaves to AdamW.
    """

    lr: float = 1e-3
    final_lr_ratio: float = 0.1
    warmup: float = 0.02
    decay_from: float = 0.5
    tails: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    kind: str = "adamw"
    momentum: float = 0.95
    adamw_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"--optim.kind {self.kind}: one of {', '.join(KINDS)}")
        for name in ("lr", "eps", "clip", "adamw_lr_ratio"):
            self._check(name, getattr(self, name) > 0, "a number above 0")
        for name in ("final_lr_ratio", "weight_decay"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("warmup", "decay_from"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a share of the run, from 0 to 1")
        try:
            fits = all(self.decay_from < float(share) < 1 and ratio >= 0 for share, ratio in self.tails.items())
        except ValueError:
            fits = False
        self._check("tails", fits, 'shares between decay_from and 1 with a rate over the peak: {"0.97": 0.1}')
        self._check("betas", all(0 <= rate < 1 for rate in self.betas), "a number from 0 to below 1")
        self._check("momentum", 0 <= self.momentum < 1, "a number from 0 to below 1")
        if self.kind == "adamw_bf16" and max(self.betas) > SLOWEST:
            raise UserError(
                f"--optim.betas {list(self.betas)}: adamw_bf16 would round the steps of its moments away; "
                f"give {SLOWEST} at most, or take adamw"
            )

    def _check(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise UserError(f"--optim.{name} {getattr(self, name)}: give {wanted}")


def build_optimizer(
    model: nn.Module, settings: OptimSettings, lr_ratios: Mapping[str, float] = NO_RATIOS
) -> torch.optim.Optimizer:
    """Build the optimiser of `settings.kind`; weight decay on matrices (two axes and more) only; fused where it can be.

    lr_ratios: learning rates over that of the settings, of parameters with these words in their names.
    Raises `UserError` for a kind whose package is not there.
    """
    groups: dict[tuple[bool, float, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = next((ratio for word, ratio in lr_ratios.items() if word in name), 1.0)
            parts = _matrices_in(name, parameter) if settings.kind == "muon" else 0
            ratio *= settings.adamw_lr_ratio if settings.kind == "muon" and not parts else 1.0
            groups.setdefault((parameter.dim() >= 2, ratio, parts), []).append(parameter)
    described = [
        {"params": members, "weight_decay": settings.weight_decay if decays else 0.0, "lr_ratio": ratio, "parts": parts}
        for (decays, ratio, parts), members in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]
    make = _class_of(settings.kind, settings.momentum)
    return make(described, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def _matrices_in(name: str, parameter: nn.Parameter) -> int:
    """Return how many matrices stand one above the other in each of a parameter's; 0 where Muon has no part in it."""
    if parameter.dim() < 2 or any(word in name for word in LOOKED_UP):
        return 0
    return 2 if name.endswith("gate_up_proj") else 1


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set that of every group, by its ratio."""
    for group in optimizer.param_groups:
        value = lr * group.get("lr_ratio", 1.0)
        if isinstance(group["lr"], torch.Tensor):  # torchao compiles its step, and a number would be part of it
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def step_scaled(optimizer: torch.optim.Optimizer, gradients: Sequence[torch.Tensor], factor: float) -> None:
    """Multiply the gradients and update the weights; on CUDA, AdamW's one kernel does both in one pass over them."""
    if factor != 1.0 and isinstance(optimizer, torch.optim.AdamW) and kernels.on_cuda(gradients[0]):
        # As torch's own loss scaling hands over what gradients are to be divided by.
        optimizer.grad_scale = torch.full((), 1 / factor, device=gradients[0].device)
        optimizer.step()
        del optimizer.grad_scale
        return
    if factor != 1.0:
        torch._foreach_mul_(gradients, factor)
    optimizer.step()


def _class_of(kind: str, momentum: float) -> Callable[..., torch.optim.Optimizer]:
    if kind == "adamw8bit":
        with quiet_imports():
            from torchao.optim import AdamW8bit
        quiet_compiler()
        return AdamW8bit
    if kind == "paged_adamw8bit":
        try:
            from bitsandbytes.optim import PagedAdamW8bit
        except ImportError:
            raise UserError(f"--optim.kind {kind}: needs the package; pip install bitsandbytes") from None
        return PagedAdamW8bit
    if kind == "muon":
        return partial(resolve_name("training.optim.muon:Muon"), momentum=momentum)
    if kind == "adamw_bf16":
        return resolve_name("training.optim.adamw:AdamWBF16")
    return partial(torch.optim.AdamW, fused=True)


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the optimiser's state itself, not copies, as flat tensors named `<parameter>|<quantity>`.

    Quantities in 8 bits have several: `...|<part>`.
    """
    names = {p: name for name, p in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
                parts, _ = value.__tensor_flatten__()
                tensors.update({f"{names[p]}|{key}|{part}": getattr(value, part).detach() for part in parts})
            else:
                tensors[f"{names[p]}|{key}"] = torch.as_tensor(value).detach()
    return tensors
