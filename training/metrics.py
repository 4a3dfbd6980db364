"""What a run says of itself: the announcement at its start, and the entry of a logged step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.costs import Costs, human
from training.parallel.ranks import Ranks
from training.run.checkpoint import Progress
from training.run.estimate import Estimate
from training.schedule import Budget
from training.settings import StageSettings

# The measures whose name in a loss is a part of it; all others are logged as they are named.
PARTS_OF_THE_LOSS = {"mtp": "mtp_loss", "balance": "balance_loss"}


@dataclass
class StepResult:
    """One optimiser step over all micro-batches and ranks.

    Attributes:
        loss: normalised total; labels: how many it was divided by; positions: that went through the network.
        metrics: means by name; counts: (MoE layers, experts) loads, or None.
        extra: entries of the data set, as they are.
    """

    loss: float
    grad_norm: float
    labels: int
    positions: int
    metrics: dict[str, float]
    counts: Tensor | None
    extra: dict[str, Any]


def step_entry(
    result: StepResult, progress: Progress, lr: float, rate: float, mfu: float, memory: int
) -> dict[str, Any]:
    """A logged step. `loss` is the part named `main`, where a loss has parts; `total_loss` is what was minimised."""
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
    """Step 0: what was measured on held-out data before any training, with the keys of every other entry."""
    zeros = {key: 0 for key in ("step", "tokens", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds")}
    return {**zeros, "loss": held_out.get("val_loss", 0), **held_out}


def max_violation(counts: Tensor) -> list[float]:
    """MaxVio of each layer: (largest load - mean load) / mean load (Wang et al. 2024, arXiv 2408.15664)."""
    mean = counts.mean(1).clamp(min=1e-9)
    return ((counts.max(1).values - mean) / mean).tolist()


def announcement(
    settings: StageSettings, ranks: Ranks, budget: Budget, costs: Costs, dtype: torch.dtype, peak: float, kernels: str,
    takes: Estimate,
) -> str:  # fmt: skip
    """Model, machine, kernels, batch, end and duration of a run, in six lines."""
    micro = min(settings.micro_rows, settings.rows // ranks.world)
    accumulation = math.ceil(settings.rows / ranks.world / micro)
    why = f" ({ranks.why})" if ranks.why else ""
    by = "" if budget.steps_by.startswith("--max_steps") else f" ({budget.steps_by})"
    ends = [f"{budget.max_steps} steps{by}"] if budget.max_steps else []
    ends += [f"{budget.max_minutes:g} minutes"] if budget.max_minutes else []
    ends += [f"{budget.max_tokens:,} tokens"] if budget.max_tokens else []
    return (
        f"model      {human(costs.total)} parameters, {human(costs.activated)} activated, "
        f"MTP adds {human(costs.mtp)}\n"
        f"machine    {ranks.world} x {ranks.device.type}{why}, {torch.get_num_threads()} threads, "
        f"{str(dtype).removeprefix('torch.')}, matrix products {peak / 1e9:,.0f} GFLOP/s\n"
        f"kernels    {kernels}\n"
        f"batch      {settings.rows} rows of {settings.row_tokens} tokens = {ranks.world} ranks x "
        f"{accumulation} accumulated x {micro} rows\n"
        f"until      {' or '.join(ends)}{', whichever is first' if len(ends) > 1 else ''}\n"
        f"takes      {takes}"
    )
