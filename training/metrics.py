"""What a run measures of itself: sums of a step, FLOPs of a token, the log's entries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from model import MiniDeepSeek
from model.costs import count
from training.losses import Loss, Metric
from training.parallel.ranks import Ranks
from training.run.checkpoint import Progress

# The measures whose name in a loss is a part of it; all others are logged as they are named.
PARTS_OF_THE_LOSS = {"mtp": "mtp_loss", "balance": "balance_loss"}


@dataclass
class StepResult:
    """One optimiser step over all micro-batches and ranks.

    Attributes:
        loss: normalised total; labels: how many it was divided by; positions: that went through the network.
        metrics: means by name; counts: (MoE layers, experts) loads, or None.
        extra: log entries of the data set.
    """

    loss: float
    grad_norm: float
    labels: int
    positions: int
    metrics: dict[str, float]
    counts: Tensor | None
    extra: dict[str, Any] = field(default_factory=dict)


class Tally:
    """Sums of one optimiser step. Every call must bring the same names, on every rank.

    A metric is a sum, logged over the count of the whole step, or a pair (sum, count), logged over its own.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, metric: Metric) -> None:
        """Add what one micro-batch measured."""
        total, count = metric if isinstance(metric, tuple) else (metric, None)
        for sums, value in ((self.sums, total), (self.counts, count)):
            if value is not None:
                value = value.detach().to(torch.float64)
                sums[name] = sums[name] + value if name in sums else value.clone()

    def gather(self, ranks: Ranks) -> None:
        """Make the sums those of all ranks."""
        for value in (*self.sums.values(), *self.counts.values()):
            ranks.sum(value)

    def take(self, name: str) -> Tensor | None:
        """Remove the sum of a name and return it; None if nobody added it."""
        return self.sums.pop(name, None)

    def means(self, count: float) -> dict[str, float]:
        """Return each sum over its own count, or over `count`. A count of nothing gives 0."""
        return {
            name: value.item() / (max(self.counts[name].item(), 1) if name in self.counts else count)
            for name, value in self.sums.items()
        }


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
    entry: dict[str, Any] = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": result.metrics.get("main", result.loss),
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
    for name, value in result.metrics.items():
        if name != "main":
            entry[PARTS_OF_THE_LOSS.get(name, name)] = value
    if result.counts is not None:
        entry["max_vio"] = max_violation(result.counts)
    return {**entry, **result.extra}


def untrained_entry(held_out: dict[str, Any]) -> dict[str, Any]:
    """Return that of step 0: what was measured before any training, with the keys of every other entry."""
    zeros = {key: 0 for key in ("step", "tokens", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds")}
    return {**zeros, "loss": held_out.get("val_loss", 0), **held_out}


def max_violation(counts: Tensor) -> list[float]:
    """MaxVio of each layer: (largest load - mean load) / mean load (Wang et al. 2024, arXiv 2408.15664)."""
    mean = counts.mean(1).clamp(min=1e-9)
    return ((counts.max(1).values - mean) / mean).tolist()
