"""What a run will take on this machine, told before its first step: time and memory, from what is known of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model import MiniDeepSeek
from model.costs import activation_numbers, human
from training.chunks import CHUNK_ELEMENTS
from training.run.console import duration
from training.schedule import Budget
from training.settings import StageSettings

USUAL_SHARE = 0.3  # of the matrix peak; the runs in docs/performance.md are between a sixth and two thirds
SLOW_STEP = 30.0  # seconds from which a step is worth a warning
FP32 = 4  # bytes
MOMENTS = {"adamw": 8, "adamw_bf16": 4, "adamw8bit": 2, "paged_adamw8bit": 2, "muon": 4}  # bytes of a weight's
PROCESS = 0.4e9  # bytes of Python and torch themselves
LOGITS = 3 * FP32 * CHUNK_ELEMENTS  # logits, their softmax and their gradient, chunk by chunk


@dataclass(frozen=True)
class Estimate:
    """Attributes: step: seconds; steps: of the whole run; seconds: of these; memory: bytes of a rank at its peak."""

    step: float
    steps: int
    seconds: float
    memory: float

    def __str__(self) -> str:
        return (
            f"about {duration(self.step)} a step, {self.steps:,} steps in {duration(self.seconds)}, "
            f"{human(self.memory, 'B')} of memory a rank"
        )


def estimate(
    settings: StageSettings, budget: Budget, model: MiniDeepSeek, flops: float, peak: float, device: torch.device,
    dtype: torch.dtype,
) -> Estimate:  # fmt: skip
    """From the FLOPs of a token, over the usual share of the peak that all ranks have together (FLOP/s)."""
    step = settings.rows * settings.row_tokens * flops / (USUAL_SHARE * peak)
    return Estimate(
        step, *length(budget, step, settings.rows * settings.row_tokens), memory(settings, model, device, dtype)
    )


def length(budget: Budget, step: float, step_tokens: int) -> tuple[int, float]:
    """Steps and seconds of a run whose steps take `step` seconds and have so many tokens."""
    counts = []
    if budget.max_steps is not None:
        counts.append(budget.max_steps)
    if budget.max_tokens is not None:
        counts.append(-(-budget.max_tokens // step_tokens))
    if budget.max_minutes is not None:
        counts.append(max(round(60 * budget.max_minutes / step), 1))
    return min(counts), min(counts) * step


def memory(settings: StageSettings, model: MiniDeepSeek, device: torch.device, dtype: torch.dtype) -> float:
    """Weights, gradients, moments, the copy that is saved in the background, and the activations of a micro-batch."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(p.nbytes for p in model.parameters()) + trained * (FP32 + MOMENTS[settings.optim.kind])
    if device.type == "cpu":
        held += PROCESS + settings.background_save * trained * (FP32 + MOMENTS[settings.optim.kind])
    config, tokens = model.config, settings.micro_rows * settings.row_tokens
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    numbers = activation_numbers(config)
    if settings.gradient_checkpointing:  # what enters each layer, and all of the one that is recomputed
        numbers = numbers / layers + 2 * layers * config.hidden_size
    return held + LOGITS + numbers * dtype.itemsize * tokens
