"""What a run will take on this machine: time and memory, reported before its first step; and how many rows a step."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import fields
from pathlib import Path

import torch

from errors import folded
from model import MiniDeepSeek, kernels
from model.costs import activation_numbers, human
from model.costs import count as count_costs
from training.losses import CHUNK_ELEMENTS, CUDA_CHUNK_ELEMENTS
from training.parallel.ranks import Ranks
from training.run.lines import counted, duration
from training.run.progress import Progress, saved_run
from training.schedule import Budget
from training.settings import StageSettings
from training.step import Dataset, PolicyDataset

ENOUGH = 100  # steps that a run should have: schedules and Adam's moments need tens of them
FEW = 20
USUAL_SHARE = 0.3  # of the matrix peak; the runs in docs/performance.md are between a sixth and two thirds
SLOW_STEP = 30.0  # seconds from which a step is worth a warning
FP32 = 4  # bytes
MOMENTS = {"adamw": 8, "adamw_bf16": 4, "adamw8bit": 2, "paged_adamw8bit": 2, "muon": 4}  # bytes of a weight's
FILLED = 0.5  # share of a GPU's memory that the estimate may take: it leaves out a reference or a teacher
PROCESS = 0.4e9  # bytes of Python and torch themselves


def step_seconds(settings: StageSettings, flops: float, peak: float) -> float:
    """Estimate a step from the FLOPs of a token, at the usual share of the peak of all ranks together (FLOP/s)."""
    return settings.rows * settings.row_tokens * flops / (USUAL_SHARE * peak)


def length(budget: Budget, step: float, step_tokens: int, done: Progress) -> tuple[int, float]:
    """Return steps and seconds that a run has before it, whose (largest) steps take `step` seconds.

    step_tokens: of a step.
    """
    steps = []
    if budget.max_steps is not None:
        steps.append(budget.max_steps - done.step)
    if budget.max_tokens is not None:
        steps.append(math.ceil((budget.max_tokens - done.tokens) / step_tokens))
    if budget.max_minutes is not None:
        steps.append(round((60 * budget.max_minutes - done.seconds) / step))
    count = max(min(steps), 1)
    return count, (budget.batches.largest_left(done.step) if budget.batches else count) * step


def batch_line(rows: int, row_tokens: int, ranks: Ranks, micro: int) -> str:
    """Return how a step's rows are shared. micro: most rows of a micro-batch."""
    share = rows // ranks.shares
    sharing = counted(ranks.shares, "rank")
    if ranks.pp > 1:
        sharing = f"{counted(ranks.shares, 'pipeline')} of {ranks.pp} ranks"
    micro = min(micro, share)
    parts = f"{math.ceil(share / micro):,} micro-batch{'es' * (share > micro)}"
    each = "at most " * (share % micro > 0) + counted(micro, "row")
    return f"{counted(rows, 'row')} of {row_tokens} tokens: {sharing}, {parts} of {each}"


def memory(settings: StageSettings, model: MiniDeepSeek, device: torch.device, dtype: torch.dtype) -> float:
    """Return bytes of weights, gradients, moments, the copy being saved, and the activations of a micro-batch."""
    whole, shares = list(model.parameters()), [getattr(p, "_local_tensor", p) for p in model.parameters()]
    trained = sum(share.numel() for p, share in zip(whole, shares, strict=True) if p.requires_grad)
    held = sum(share.nbytes for share in shares) + trained * (FP32 + MOMENTS[settings.optim.kind])
    if shares[0] is not whole[0] and settings.dist.zero < 3:  # gathered weights, and their gradients
        held += sum(p.numel() for p in whole) * (dtype.itemsize + FP32)
    if device.type == "cpu":
        held += PROCESS + settings.background_save * trained * (FP32 + MOMENTS[settings.optim.kind])
    config, tokens = model.config, min(settings.micro_rows, settings.rows) * settings.row_tokens
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    numbers = activation_numbers(config)
    if settings.gradient_checkpointing:  # what enters each layer, and all of the one that is recomputed
        numbers = numbers / layers + 2 * layers * config.hidden_size
    logits = 3 * FP32 * CHUNK_ELEMENTS  # logits, their softmax and their gradient, chunk by chunk
    if device.type == "cuda":  # the gradient in the place of the logits
        logits = (FP32 + dtype.itemsize) * min(CUDA_CHUNK_ELEMENTS, tokens * config.vocab_size)
    return held + logits + numbers * dtype.itemsize * tokens


def memory_of(device: torch.device) -> float:
    """Return bytes of memory that a rank has: of its GPU, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class Pace:
    """How long steps take: announced before the first, corrected by the first micro-batch, warned of when very long."""

    def __init__(self, settings: StageSettings, ranks: Ranks, budget: Budget) -> None:
        self._settings, self._ranks, self._budget = settings, ranks, budget
        self.known = self._warned = False
        self._about = "up to" if budget.batches else "about"  # a step takes
        self._progress, self._begin = Progress(), (0, 0.0, 0.0)  # step, share and seconds where this sitting began
        self.pause = 0.0  # seconds that the last validation took: those to come take as long

    def announce(
        self, model: MiniDeepSeek, dataset: Dataset, flops: int, peak: float, dtype: torch.dtype, progress: Progress
    ) -> None:
        """Say in six lines what runs: model, machine, kernels, batch, end and duration of what is left.

        flops: of a token; progress: of the run so far, which later steps are to write into.
        """
        settings, ranks, budget, self._progress = self._settings, self._ranks, self._budget, progress
        spent = progress.step, progress.seconds, progress.tokens
        share = budget.batches.done(progress.step) if budget.batches else budget.progress(*spent)
        self._begin = progress.step, share, progress.seconds
        costs = count_costs(model.config, settings.sequence_length)
        step = step_seconds(settings, flops, peak)
        sampled = isinstance(dataset, PolicyDataset)
        warn_of_few_steps(settings, ranks, len(dataset), None if sampled else step)
        steps, seconds = length(budget, step, settings.rows * settings.row_tokens, progress)
        needs, has = memory(settings, model, ranks.device, dtype), memory_of(ranks.device)
        noun = "more step" if progress.step else "step"
        why = f" ({ranks.why})" if ranks.why else ""
        by = budget.steps_by.split()[0] if budget.steps_by.startswith("--max_steps") else budget.steps_by
        ends = [f"{counted(budget.max_steps, 'step')} ({by})"] if budget.max_steps else []
        if budget.max_minutes:
            ends.append(f"{budget.max_minutes:g} minute{'s' * (budget.max_minutes != 1)} (--max_minutes)")
        ends += [counted(budget.max_tokens, "token")] if budget.max_tokens else []
        smaller, last = "", settings.rows
        if budget.batches:
            smaller, last = budget.batches.smaller_first(), budget.batches.phases[-1].rows
        taken = (model.config, dtype, ranks.device, settings.row_tokens, settings.compiles(ranks.device))
        self._say(
            f"model      {human(costs.total)} parameters, {human(costs.activated)} activated, "
            f"MTP adds {human(costs.mtp)}\n"
            f"machine    {ranks.world} x {ranks.device.type}{why}, {torch.get_num_threads()} threads, "
            f"{str(dtype).removeprefix('torch.')}, matrix products {peak / 1e9:,.0f} GFLOP/s\n"
            f"kernels    {kernels.report.kernel_report(*taken)}\n"
            f"batch      {smaller}{batch_line(last, settings.row_tokens, ranks, settings.micro_rows)}\n"
            f"until      {' or '.join(ends)}{', whichever is first' if len(ends) > 1 else ''}\n"
            f"takes      {self._pace(step, counted(steps, noun), seconds, sampled)}, "
            f"{human(needs, 'B')} of memory a rank"
        )
        if needs > has:
            self._say(
                f"warning    the run needs about {human(needs, 'B')}, this machine has "
                f"{human(has, 'B')} a rank: lower --micro_tokens, now {settings.micro_tokens:,}, "
                "pass --gradient_checkpointing true, or take a smaller model"
            )
        self._warn_of_slow_steps(step)

    def report(self, seconds: float, rows: int) -> None:
        """Say what the `seconds` of the first micro-batch, of so many rows, make of a step, where it is long."""
        self.known = True
        share = self._settings.rows // self._ranks.shares
        step = seconds * share / rows  # the last micro-batch may have fewer rows
        if step > SLOW_STEP / 3:
            step_tokens = self._settings.rows * self._settings.row_tokens
            steps, left = length(self._budget, step, step_tokens, self._progress)
            part = "rest of the run" if self._progress.step else "whole run"
            pace = f"{self._about} {duration(step)} a step, {duration(left + self._pauses(steps))} for the {part}"
            self._say(f"measured   micro-batch 1 of {math.ceil(share / rows)} took {duration(seconds)}: {pace}")
            self._warn_of_slow_steps(step)

    def left(self, share: float) -> float | None:
        """Return seconds until the run's end: of training at the pace of this sitting, and of the validations to come.

        share: of the budget that is spent.
        """
        (first, before, since), now = self._begin, self._progress
        if self._budget.batches:  # steps that are larger take longer
            share = self._budget.batches.done(now.step)
        if share <= before:
            return None
        rest = (1 - share) / (share - before)
        return rest * (now.seconds - since) + self._pauses(max(round(rest * (now.step - first)), 1))

    def _pauses(self, steps: int) -> float:
        """Return the seconds of validations in so many steps from now, the last of which ends the run."""
        every, now = self._settings.val_every, self._progress.step
        return (1 + ((steps - 1 + now % every) // every if every else 0)) * self.pause

    def _warn_of_slow_steps(self, seconds: float) -> None:
        """Say once what helps where a step takes so long that nobody would wait for the first."""
        if seconds > SLOW_STEP and not self._warned:
            self._warned = True
            remedy = self._settings.lighten(self._ranks.device.type)
            self._say(f"warning    a step takes about {duration(seconds)} here: {remedy}")

    def _pace(self, step: float, steps: str, seconds: float, sampled: bool) -> str:
        """Return how long steps take. sampled: their rows are, and nobody knows yet how long they become."""
        if not sampled:
            return f"{self._about} {duration(step)} a step, {steps} in {duration(seconds)}"
        clock = self._budget.max_minutes and seconds >= 60 * self._budget.max_minutes - self._progress.seconds - step
        run = f"at least {steps}" if clock else f"{steps} in at most {duration(seconds)}"
        return f"at most {duration(step)} a step where replies are as long as they may be, {run}, sampling apart"

    def _say(self, text: str) -> None:
        self._ranks.say(folded(text))


def fit_batch(settings: StageSettings, ranks: Ranks, samples: int) -> None:
    """Set `batch_tokens` to whole rows that the ranks share evenly and that leave the run enough steps, if it can.

    A value of the command line holds, and so do several along the run. A resumed run has the rows that it began with,
    whatever its budget is now.

    Args:
        samples: of an epoch.
    """
    if settings.holds("batch_tokens") or settings.uneven or settings.rows_by_share:
        return
    saved = ranks.on_main(lambda: saved_run(Path(settings.out), settings.resume)).get("rows")
    if type(saved) is int and saved > 0:
        settings.batch_tokens = saved * settings.row_tokens
        return
    ceiling = settings.rows
    rows = fitting_rows(settings, ranks.shares, samples)
    if rows != ceiling:
        settings.batch_tokens = rows * settings.row_tokens
        budget = settings.budget(samples)
        whole = f", for a run of {counted(budget.max_steps, 'step')}" if budget.max_steps else ""
        by = budget.steps_by or f"--max_minutes {budget.max_minutes:g}"
        rather = f"notice: {rows} row{'s' * (rows > 1)} a step instead of {ceiling}{whole}"
        keeps = f"--batch_tokens {ceiling * settings.row_tokens} keeps {ceiling}"
        ranks.say(folded(f"{rather} ({by}, {samples} rows an epoch); {keeps}"))


def fit_micro_batch(settings: StageSettings, ranks: Ranks, model: MiniDeepSeek, dtype: torch.dtype) -> None:
    """Raise a `micro_tokens` that nobody chose to what `FILLED` of a GPU's memory holds: launches cost it most.

    That depends on the card and the run alone, not on what is free: a resumed run finds the same.
    """
    usual = next(each.default for each in fields(settings) if each.name == "micro_tokens")
    chosen = settings.holds("micro_tokens") or settings.micro_tokens != usual
    if ranks.device.type != "cuda" or settings.uneven or chosen:
        return
    rows, trial = settings.rows // ranks.shares, copy.copy(settings)
    for parts in range(1, rows + 1):
        trial.micro_tokens = -(-rows // parts) * settings.row_tokens
        if trial.micro_rows <= settings.micro_rows:
            return
        if memory(trial, model, ranks.device, dtype) <= FILLED * memory_of(ranks.device):
            settings.micro_tokens = trial.micro_tokens
            return


def fitting_rows(settings: StageSettings, world: int, samples: int) -> int:
    """Return the most rows, at most those of the settings and a multiple of `world`, that leave a run `ENOUGH` steps.

    Where no number does, the most of those that leave it as many as it can have. Never more than an epoch has: no step
    sees a row twice within one.
    """

    def steps(rows: int) -> float:
        return settings.budget(samples, rows).max_steps or math.inf

    enough = min(ENOUGH, steps(world))
    most = min(settings.rows, max(samples, world))
    choices = range(most - most % world, 0, -world)
    return next((rows for rows in choices if steps(rows) >= enough), settings.rows)


def warn_of_few_steps(settings: StageSettings, ranks: Ranks, samples: int, step: float | None) -> None:
    """Say in one line that a run is too short to learn from, and what makes it longer.

    step: its seconds as estimated, which say how many the clock leaves; None where nobody can.
    """
    budget, minutes = settings.budget(samples), settings.max_minutes
    by_clock = max(round(60 * minutes / step), 1) if minutes and step else math.inf
    steps = min(budget.max_steps or math.inf, by_clock)
    if steps >= FEW:
        return
    if budget.max_steps is None or by_clock < budget.max_steps:
        about, by = "about ", f"--max_minutes {minutes:g}"
        remedy = f"give --max_minutes {math.ceil(ENOUGH * step / 60)} for {ENOUGH} steps"
    else:
        about, by = "", budget.steps_by
        remedy = f"raise {by.split()[0]}"
        if by.startswith("--epochs"):
            remedy = f"give --epochs {math.ceil(ENOUGH * settings.rows / samples)} for {ENOUGH} steps"
    if remedy.startswith("give") and settings.rows > ranks.shares and not settings.uneven:
        remedy += ", or a smaller --batch_tokens"
    ends = f"notice: this run ends after {about}{counted(steps, 'step')} ({by}), too few to learn"
    ranks.say(folded(f"{ends}; {remedy}"))
