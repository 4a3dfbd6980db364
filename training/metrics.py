"""What a run measures of itself: sums of a step, FLOPs of a token, the log's entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from model import MiniDeepSeek
from model.costs import count
from training.losses import Loss, Metric
from training.machine import to_device
from training.parallel.ranks import Ranks
from training.run.progress import Progress

COUNT = "|count"  # behind the name of a pair, of its count
# The measures whose name in a loss is a part of it; all others are logged as they are named.
PARTS_OF_THE_LOSS = {"mtp": "mtp_loss", "balance": "balance_loss"}


@dataclass
class StepResult:
    """One optimiser step over all micro-batches and ranks.

    Attributes:
        loss: normalised total; labels: how many it was divided by; tokens: as the data set counts them.
        metrics: means by name; counts: (MoE layers, experts) loads, on the host, or None.
        shared: what the loop wanted to know of all ranks, summed over them.
        extra: log entries of the data set.
    """

    loss: float
    grad_norm: float
    labels: int
    tokens: int
    metrics: dict[str, float]
    counts: Tensor | None
    shared: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class Tally:
    """Sums of one optimiser step: over micro-batches on the device, over ranks in one exchange, read by the host once.

    Every call must bring the same names and shapes, on every rank. A metric is a sum, or a pair (sum, count) that is
    logged over its own count.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # all of them, one behind the other, float64
        self._shapes: dict[str, torch.Size] = {}

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Add what one micro-batch measured, without waiting for the device."""
        parts: dict[str, Tensor] = {}
        for name, metric in metrics.items():
            total, count = metric if isinstance(metric, tuple) else (metric, None)
            parts |= {name: total} if count is None else {name: total, f"{name}{COUNT}": count}
        flat = torch.cat([value.detach().double().flatten() for value in parts.values()])
        self._sums = flat if self._sums is None else self._sums.add_(flat)
        self._shapes = {name: value.shape for name, value in parts.items()}

    def gather(self, ranks: Ranks, **more: Tensor | float) -> Sums:
        """Sum over all ranks, with numbers that are not of micro-batches, and read it. The only wait of a step."""
        own = {name: value for name, value in more.items() if not isinstance(value, Tensor)}
        tensors = [value.double().view(1) for value in more.values() if isinstance(value, Tensor)]
        told = to_device({"told": torch.tensor(list(own.values()), dtype=torch.float64)}, ranks.device)["told"]
        summed = ranks.sum(torch.cat([self._sums, *tensors, told]))
        names = [name for name in more if name not in own] + [*own]
        shapes = self._shapes | dict.fromkeys(names, torch.Size())
        on_host = summed.cpu()
        return Sums(_named(summed, shapes), _named(on_host, shapes))


@dataclass(frozen=True)
class Sums:
    """What a `Tally` gathered, by name. Attributes: on_device: tensors; on_host: the same, where their values are."""

    on_device: dict[str, Tensor]
    on_host: dict[str, Tensor]

    def take(self, name: str) -> float:
        """Remove the sum of a name and return it."""
        return self.on_host.pop(name).item()

    def means(self, count: float) -> dict[str, float]:
        """Return each sum over its own count, or over `count`. A count of nothing gives 0."""
        own = {name: value.item() for name, value in self.on_host.items()}
        return {
            name: value / (max(own[f"{name}{COUNT}"], 1) if f"{name}{COUNT}" in own else count)
            for name, value in own.items()
            if not name.endswith(COUNT)
        }


def _named(values: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    parts = values.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


class FlopsCounter:
    """FLOPs of a token of training. Whether MTP runs, and how often, is the loss's to say; it may change in a run."""

    def __init__(self, model: MiniDeepSeek, loss: Loss, time: int) -> None:
        """time: positions of a sequence."""
        self.model, self.loss, self.time = model, loss, time
        main = [p for name, p in model.named_parameters() if not name.startswith("mtp.")]
        self.trained = sum(p.numel() for p in main if p.requires_grad)
        self._counted: dict[int, int] = {}

    @property
    def mtp_passes(self) -> int:
        """MTP layers over a sequence: those of the model, and the unrolled steps of the last."""
        if not (self.model.mtp and getattr(self.loss, "runs_mtp", False)):
            return 0
        return len(self.model.mtp) + getattr(self.loss, "mtp_steps", 1) - 1

    def flops(self) -> int:
        """Return those of forward and backward of a token now; weight gradients are a third of the products."""
        passes = self.mtp_passes
        if passes not in self._counted:
            costs = count(replace(self.model.config, num_nextn_predict_layers=passes), self.time)
            frozen = 1 - min(self.trained / costs.total, 1)
            self._counted[passes] = round(costs.flops - costs.products * frozen / 3)
        return self._counted[passes]


def step_entry(
    result: StepResult, progress: Progress, lr: float, rate: float, mfu: float, memory: int
) -> dict[str, Any]:
    """Return the entry of a logged step: `loss` is the part named `main`, if there is one, `total_loss` their sum."""
    own = measures(result)
    entry: dict[str, Any] = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": own.pop("loss"),
        "total_loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens_per_second": rate,
        "mfu": mfu,
        "seconds": progress.seconds,
        "labels": result.labels,
        "skipped": progress.skipped,
        "memory": memory,
    }
    if result.counts is not None:
        entry["max_vio"] = max_violation(result.counts)
    return {**entry, **own, **result.extra}


def measures(result: StepResult) -> dict[str, float]:
    """Return what a step measured on its samples, by the names of the log: `loss` among them."""
    named = {PARTS_OF_THE_LOSS.get(name, name): value for name, value in result.metrics.items()}
    numbers = {name: value for name, value in result.extra.items() if isinstance(value, (int, float))}
    return {"loss": named.pop("main", result.loss), **named, **numbers}


def untrained_entry(held_out: dict[str, Any]) -> dict[str, Any]:
    """Return that of step 0: what was measured before any training, with the keys of every other entry."""
    zeros = {key: 0 for key in ("step", "tokens", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds")}
    return {**zeros, "loss": held_out.get("val_loss", 0), **held_out}


def max_violation(counts: Tensor) -> list[float]:
    """MaxVio of each layer: (largest load - mean load) / mean load (Wang et al. 2024, arXiv 2408.15664)."""
    mean = counts.mean(1).clamp(min=1e-9)
    return ((counts.max(1).values - mean) / mean).tolist()
