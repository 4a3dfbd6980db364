"""The one loop of all stages: batches in, optimiser steps, the router's bias, logs, checkpoints."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from errors import UserError
from model import MiniDeepSeek
from model.counts import Costs, human
from model.counts import count as count_costs
from model.moe import update_bias
from text.tokenizer import Tokenizer
from training.checkpoint import Progress, keep_last, load_training_state, newest, read_progress, save_checkpoint
from training.log import RunLog
from training.losses import Batch, NextTokenLoss
from training.machine import autocast, choose_dtype, measured_peak, peak_memory
from training.optim import build_optimizer
from training.ranks import Ranks
from training.schedule import Budget, learning_rate, value_at
from training.settings import StageSettings, save_resolved
from training.validation import evaluate


class Dataset(Protocol):
    """What a stage trains on: sample `i`, counted from the start of training, is a function of (seed, i) alone."""

    def __len__(self) -> int: ...

    def batch(self, indices: list[int]) -> Batch: ...


@dataclass
class StepResult:
    """One optimiser step over all micro-batches and ranks. `loss`: normalised total; `labels`: how many counted."""

    loss: float
    grad_norm: float
    labels: int
    metrics: dict[str, float]
    counts: Tensor | None


class Trainer:
    """Runs a stage to the end of its budget, from the newest checkpoint when resuming.

    Args:
        model: fp32 weights. dataset: samples of `settings.sequence_length` tokens.
        validation: held-out batches, or None.
        loss: returns (sum, count, metrics); sums are divided by the labels counted in the whole step.
    """

    def __init__(
        self,
        settings: StageSettings,
        ranks: Ranks,
        model: MiniDeepSeek,
        tokenizer: Tokenizer,
        dataset: Dataset,
        loss: NextTokenLoss,
        validation: list[Batch] | None = None,
    ) -> None:
        self.settings, self.ranks, self.tokenizer = settings, ranks, tokenizer
        self.model = model.to(ranks.device)
        self.model.gradient_checkpointing = settings.gradient_checkpointing
        self.dataset, self.loss, self.validation = dataset, loss, validation or []
        self.out = Path(settings.out)
        self.dtype = choose_dtype(settings.dtype, ranks.device)
        self.rows = max(settings.batch_tokens // settings.sequence_length, 1)
        if self.rows % ranks.world:
            raise UserError(
                f"--batch_tokens {settings.batch_tokens}: {self.rows} rows do not divide among {ranks.world} ranks; "
                f"choose a multiple of {ranks.world * settings.sequence_length}"
            )
        longest = model.config.max_position_embeddings
        if settings.sequence_length > longest:
            raise UserError(
                f"--sequence_length {settings.sequence_length}: the model reads {longest} tokens; "
                "lower it, or give a new model a larger max_position_embeddings"
            )
        self.micro_rows = max(settings.micro_tokens // settings.sequence_length, 1)
        self.budget = self._budget()
        self.progress = Progress(run=self._fixed())
        self.optimizer = build_optimizer(self.model, settings.optim)
        self.interrupted = False

    def run(self) -> Path:
        """Train until the budget is spent or a signal arrives. Returns the newest checkpoint folder."""
        fresh = not self._resume()
        if self.progress.finished:
            self.ranks.say(f"{self.out}: already complete after {self.progress.step} steps; raise the budget to go on")
            return self.out / "final"
        if self.settings.compile:
            for layer in [*self.model.model.layers, *self.model.mtp]:
                layer.compile(dynamic=False)
        self.module = self.ranks.wrap(self.model)
        costs = count_costs(self.model.config, self.settings.sequence_length)
        peak = measured_peak(self.dtype, self.ranks.device) * self.ranks.world if self.ranks.main else 1.0
        self._announce(costs, peak)
        if self.ranks.main:
            self.out.mkdir(parents=True, exist_ok=True)
            save_resolved(self.settings, self.out / "config.yaml")
        previous = {name: signal.signal(name, self._interrupt) for name in (signal.SIGINT, signal.SIGTERM)}
        log = RunLog(self.out, self.progress.step, self.ranks.main, self.settings.wandb, asdict(self.settings))
        try:
            with log:
                self._loop(log, fresh, costs.flops / peak)
        finally:
            for name, handler in previous.items():
                signal.signal(name, handler)
        self._finish()
        return newest(self.out) or self.out

    def _loop(self, log: RunLog, fresh: bool, mfu_per_rate: float) -> None:
        """Steps until the budget is spent or a signal came. Validating and saving are not training time."""
        settings, progress = self.settings, self.progress
        if fresh and self.validation:
            log.write(self._untrained_entry())
        origin = time.perf_counter() - progress.seconds
        window_tokens, window_seconds = progress.tokens, progress.seconds
        stop = False
        while not stop and not progress.finished:
            # The rate of a step is that of its end, so that the first is not 0 and the last is the final one.
            lr = self._set_rates(max(self.budget.progress(progress.step + 1, progress.seconds), 1e-4))
            result = self._step()
            progress.step += 1
            progress.tokens += self.rows * settings.sequence_length
            progress.seconds, stop = self._agree(time.perf_counter() - origin)
            share = self.budget.progress(progress.step, progress.seconds)
            progress.finished = share >= 1
            log.progress(share)
            pause = time.perf_counter()
            validate = progress.finished or bool(settings.val_every and progress.step % settings.val_every == 0)
            if validate or progress.step == 1 or progress.step % settings.log_every == 0:
                rate = (progress.tokens - window_tokens) / max(progress.seconds - window_seconds, 1e-9)
                window_tokens, window_seconds = progress.tokens, progress.seconds
                entry = self._entry(result, lr, rate, rate * mfu_per_rate)
                log.write({**entry, **self._validate()} if validate else entry)
            if settings.save_every and progress.step % settings.save_every == 0 and not progress.finished:
                self._save(f"step-{progress.step}")
            origin += time.perf_counter() - pause

    def _finish(self) -> None:
        """Save the end of the run, or the point where it was interrupted."""
        name = "final" if self.progress.finished else f"step-{self.progress.step}"
        if self.progress.finished or not (self.out / name).is_dir():
            self._save(name)
        if not self.progress.finished:
            self.ranks.say(f"interrupted: saved {self.out / name}; the same command with --resume goes on from there")
        else:
            self.ranks.say(
                f"finished: {self.out / name} after {self.progress.step} steps, {self.progress.tokens:,} tokens"
            )

    def _step(self) -> StepResult:
        """One optimiser step: accumulate, normalise by all counted labels, clip, update weights and router biases."""
        ranks, per_rank = self.ranks, self.rows // self.ranks.world
        first = self.progress.step * self.rows
        # Rank r takes a contiguous share of the step's samples, so the sum over ranks is the sum over the batch.
        mine = range(first + ranks.rank * per_rank, first + (ranks.rank + 1) * per_rank)
        micro = [mine[start : start + self.micro_rows] for start in range(0, per_rank, self.micro_rows)]
        nominal = self.rows * self.settings.sequence_length
        sums: dict[str, Tensor] = {}
        for index, indices in enumerate(micro):
            batch = self._move(self.dataset.batch(list(indices)))
            with ranks.no_sync(self.module, index < len(micro) - 1), autocast(self.dtype, ranks.device):
                loss, count, metrics = self.loss(self.module, batch)
                (loss / nominal).backward()
            for name, value in {"loss": loss.detach(), "count": count, **metrics}.items():
                sums[name] = sums[name] + value if name in sums else value.double()
        totals = {name: ranks.sum(value) for name, value in sums.items()}
        count = max(totals["count"].item(), 1)
        # DDP averaged over ranks, and each micro-batch was divided by the nominal number of labels.
        scale = nominal * ranks.world / count
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, scale)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        counts = totals.pop("counts", None)
        if counts is not None:
            for router, load in zip(self.model.routers(), counts, strict=False):
                update_bias(router.e_score_correction_bias, load, self.bias_speed)
        labels = int(totals.pop("count").item())
        means = {name: value.item() / count for name, value in totals.items()}
        return StepResult(means.pop("loss"), norm.item(), labels, means, counts)

    def _set_rates(self, share: float) -> float:
        """Move learning rate, loss weights and bias speed along their schedules."""
        settings = self.settings
        lr = learning_rate(
            share, settings.optim.lr, settings.optim.warmup, settings.optim.decay_from, settings.optim.final_lr_ratio
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.loss.mtp_weight = value_at(settings.mtp_weight, share, "mtp_weight")
        self.loss.balance_weight = value_at(settings.balance_weight, share, "balance_weight")
        self.bias_speed = value_at(settings.bias_speed, share, "bias_speed")
        return lr

    def _entry(self, result: StepResult, lr: float, rate: float, mfu: float) -> dict[str, Any]:
        """A logged step."""
        entry: dict[str, Any] = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": result.metrics.get("main", result.loss),
            "total_loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": rate,
            "mfu": mfu,
            "seconds": self.progress.seconds,
            "labels": result.labels,
            "memory": peak_memory(self.ranks.device),
        }
        for name, key in (("mtp", "mtp_loss"), ("balance", "balance_loss")):
            if name in result.metrics:
                entry[key] = result.metrics[name]
        if result.counts is not None:
            entry["max_vio"] = max_violation(result.counts)
        return entry

    def _untrained_entry(self) -> dict[str, Any]:
        """Step 0: the held-out loss before any training, with the keys of every other entry."""
        zeros = {key: 0 for key in ("step", "tokens", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds")}
        held_out = self._validate()
        return {**zeros, "loss": held_out["val_loss"], **held_out}

    def _validate(self) -> dict[str, Any]:
        """Held-out bits per byte, nats per token and expert loads; empty without held-out text."""
        if not self.validation:
            return {}
        self.model.eval()
        held_out = evaluate(self.model, self.validation, self.tokenizer.token_bytes, self.dtype, self.ranks)
        self.model.train()
        entry: dict[str, Any] = {"val_bits_per_byte": held_out.bits_per_byte, "val_loss": held_out.nats_per_token}
        if held_out.counts is not None:
            entry["expert_load"] = (held_out.counts / held_out.counts.sum(1, keepdim=True)).tolist()
        return entry

    def _budget(self) -> Budget:
        """The limits that were given; one pass over the data (or `epochs`) when none was."""
        settings, limits = self.settings, []
        if settings.max_steps is not None:
            limits.append(settings.max_steps)
        if settings.max_tokens is not None:
            limits.append(math.ceil(settings.max_tokens / (self.rows * settings.sequence_length)))
        if not limits and settings.max_minutes is None:
            limits.append(max(math.ceil(settings.epochs * len(self.dataset) / self.rows), 1))
        return Budget(min(limits) if limits else None, settings.max_minutes)

    def _resume(self) -> bool:
        """Take up the newest checkpoint, if asked to and there is one. Returns whether it did."""
        found = newest(self.out) if self.out.is_dir() else None
        if found is None:
            return False
        if not self.settings.resume:
            raise UserError(
                f"{self.out}: holds a run already ({found.name}); add --resume to go on, or choose another --out"
            )
        fixed = self.progress.run
        self.progress = read_progress(found)
        for name, value in fixed.items():
            before = self.progress.run.get(name, value)
            if before != value:
                raise UserError(
                    f"{found}: was trained with {name} = {before}, not {value}; a run cannot change it midway"
                )
        self.progress.finished = self.budget.progress(self.progress.step, self.progress.seconds) >= 1
        if self.progress.finished and found.name == "final":
            return True
        saved = MiniDeepSeek.from_pretrained(found)
        for name, value in asdict(self.model.config).items():
            before = getattr(saved.config, name)
            if before != value:
                raise UserError(
                    f"{found}: was trained with model.{name} = {before}, not {value}; a run cannot change it midway"
                )
        self.model.load_state_dict(saved.state_dict())
        load_training_state(found, self.model, self.optimizer)
        self.ranks.say(f"resuming from {found}: step {self.progress.step}, {self.progress.tokens:,} tokens")
        return True

    def _fixed(self) -> dict[str, Any]:
        """What the order of the data depends on."""
        settings = self.settings
        return {
            "seed": settings.seed,
            "sequence_length": settings.sequence_length,
            "rows": self.rows,
            "tokenizer": self.tokenizer.fingerprint,
        }

    def _save(self, name: str) -> None:
        if self.ranks.main:
            save_checkpoint(self.out / name, self.model, self.tokenizer, self.optimizer, self.progress)
            if name != "final":
                keep_last(self.out, self.settings.keep)
        self.ranks.barrier()

    def _agree(self, seconds: float) -> tuple[float, bool]:
        """Rank 0's clock, and whether any rank was told to stop: all ranks must end at the same step."""
        mine = torch.tensor([seconds if self.ranks.main else 0.0, float(self.interrupted)], dtype=torch.float64)
        elapsed, stop = self.ranks.sum(mine.to(self.ranks.device)).tolist()
        return elapsed, stop > 0

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """First signal: stop after this step. Second: at once."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.ranks.say("stopping after this step (again to stop at once)")

    def _move(self, batch: Batch) -> Batch:
        if self.ranks.device.type != "cuda":
            return batch
        return {key: value.pin_memory().to(self.ranks.device, non_blocking=True) for key, value in batch.items()}

    def _announce(self, costs: Costs, peak: float) -> None:
        device, micro = self.ranks.device, min(self.micro_rows, self.rows // self.ranks.world)
        accumulation = math.ceil(self.rows / self.ranks.world / micro)
        steps, minutes = self.budget.max_steps, self.budget.max_minutes
        ends = [f"{steps} steps"] if steps else []
        ends += [f"{minutes:g} minutes"] if minutes else []
        self.ranks.say(
            f"model      {human(costs.total)} parameters, {human(costs.activated)} activated, "
            f"MTP adds {human(costs.mtp)}\n"
            f"machine    {self.ranks.world} x {device.type}, {torch.get_num_threads()} threads, "
            f"{str(self.dtype).removeprefix('torch.')}, matrix products {peak / 1e9:,.0f} GFLOP/s\n"
            f"batch      {self.rows} rows of {self.settings.sequence_length} tokens = {self.ranks.world} ranks x "
            f"{accumulation} accumulated x {micro} rows\n"
            f"until      {' or '.join(ends)}, whichever is first"
        )


def max_violation(counts: Tensor) -> list[float]:
    """MaxVio of each layer: (largest load - mean load) / mean load (Wang et al. 2024, arXiv 2408.15664)."""
    mean = counts.mean(1).clamp(min=1e-9)
    return ((counts.max(1).values - mean) / mean).tolist()
