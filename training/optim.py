"""The optimiser: AdamW as DeepSeek-V3 uses it (section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class OptimSettings:
    """Optimiser and learning-rate schedule.

    Args:
        lr: peak learning rate.
        final_lr_ratio: last learning rate over the peak.
        warmup: share of the run with a linear warm-up.
        decay_from: share of the run from which the learning rate falls along a cosine.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        weight_decay: on matrices only; norms, embeddings' biases and the router bias have none.
        clip: largest norm of the gradient.
    """

    lr: float = 1e-3
    final_lr_ratio: float = 0.1
    warmup: float = 0.02
    decay_from: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices (two axes and more) only; fused where the device has it."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in trainable)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimiser's state as flat tensors named `<parameter>|<quantity>`."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}|{key}": value.detach().clone()
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `state_tensors`."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter, key = name.rsplit("|", 1)
        p = parameters[parameter]
        # The step counter stays where the fused kernel wants it: beside the parameter.
        optimizer.state[p][key] = value.to(p.device)
