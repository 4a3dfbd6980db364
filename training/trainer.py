"""The one loop of all stages: optimiser steps until the budget is spent, validations, logs, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import torch

from errors import UserError
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.batches import Batches
from training.losses import Loss
from training.machine import choose_dtype, machine_peak, memory_used
from training.metrics import FlopsCounter, StepResult, measures, step_entry, untrained_entry
from training.optim.build import NO_RATIOS, build_optimizer, set_learning_rate
from training.parallel.ranks import Ranks
from training.parallel.replication import Replicated
from training.run.checkpoint import Weights, WholeModel
from training.run.estimate import Pace, fit_batch, fit_micro_batch
from training.run.interrupt import Stopped
from training.run.lock import RunLock
from training.run.log import RunLog, open_log
from training.run.progress import BEST, Progress, identity, newest
from training.run.saver import RunCheckpoints
from training.schedule import learning_rate, value_at
from training.settings import StageSettings, save_resolved
from training.step import Dataset, OptimizerStep, PolicyDataset, ShardedUser, Skipping
from training.validation import Validation

if TYPE_CHECKING:
    from training.parallel.sharding import Sharded
    from training.run.samples import Samples

CHECKS = "training.parallel.rank_checks"


class Trainer:
    """Runs a stage to the end of its budget, from the newest checkpoint when resuming.

    Args:
        model: fp32 weights; those without `requires_grad` stay as they are.
        dataset: samples of at most `settings.row_tokens` positions; a `PolicyDataset` makes them step by step.
        loss: returns (sum, count, metrics); sums are divided by the count of the whole step.
        validation: measures held-out data before the first step, every `val_every` steps and after the last, or None.
        weights: what checkpoints hold, if it is not the whole model.
        lr_ratios: as in `build_optimizer`.
        samples: of the model's text on the way, or None.
    """

    def __init__(
        self,
        settings: StageSettings,
        ranks: Ranks,
        model: MiniDeepSeek,
        tokenizer: Tokenizer,
        dataset: Dataset,
        loss: Loss,
        validation: Validation | None = None,
        weights: Weights | None = None,
        lr_ratios: Mapping[str, float] = NO_RATIOS,
        samples: Samples | None = None,
    ) -> None:
        if settings.dist.cuts(ranks.world):
            ranks = replace(ranks, in_step=True, pp=settings.dist.pp)
        self.settings, self.ranks, self.tokenizer = settings, ranks, tokenizer
        self.dtype = choose_dtype(settings.dtype, ranks.device)
        # FLOP/s of all ranks' matrix products, which MFU is a share of.
        self.peak = machine_peak(self.dtype, ranks.device) * ranks.world if ranks.main else math.inf
        self.model = model
        self.model.gradient_checkpointing = settings.gradient_checkpointing
        self.model.has_dropout = any(isinstance(module, torch.nn.Dropout) for module in self.model.modules())
        for router in model.routers():
            router.balances_batch = settings.balance_scope == "batch"
        self.dataset, self.loss, self.validation, self.samples = dataset, loss, validation, samples
        self.out = Path(settings.out)
        fit_batch(settings, ranks, len(dataset))
        fit_micro_batch(settings, ranks, model, self.dtype)
        settings.check_fit(ranks.shares, model.config.max_position_embeddings)
        if unknown := {*settings.schedules} - {*getattr(loss, "schedules", ())}:
            raise UserError(f"{type(loss).__name__} has no schedule named {', '.join(sorted(unknown))}")
        if validation is None and (settings.keep_best or settings.patience):
            raise UserError("--keep_best and --patience: nothing is held out to measure on; give --val_fraction")
        if settings.fp8:
            ranks.say(resolve_name("model.fp8:to_fp8")(model, ranks.device, settings.fp8 == "ue8m0"))
        self.budget = settings.budget(len(dataset))
        self.progress = Progress(run=identity(settings, tokenizer, dataset))
        self.counter = FlopsCounter(model, loss, settings.sequence_length)
        self.copies: Replicated | Sharded | None = None  # of the model, on all ranks
        self.shards = None
        if settings.dist.cuts(ranks.world):
            cut = resolve_name("training.parallel.sharding:shard")
            self.copies = cut(settings, ranks, model, self.dtype, self.progress.run)
            self.model, self.shards = self.copies.model, self.copies.shards
            for user in (dataset, weights):
                if isinstance(user, ShardedUser):
                    user.take_shards(self.shards)
            settings.compile = False
            weights = weights or resolve_name("training.parallel.saved:ShardedModel")(self.copies)
            if samples:
                ranks.say("notice: no samples of the model's text: no rank holds the whole model")
            self.samples = None
        else:
            model.to(ranks.device)
        self.optimizer = build_optimizer(self.shards or model, settings.optim, lr_ratios)
        weights, shards = weights or WholeModel(model), self.shards
        self.ema = None
        if settings.ema_decay:
            average = resolve_name("training.optim.ema:ExponentialMovingAverage")
            self.ema = average(model, settings.ema_decay, shards)
        held = (weights, tokenizer, self.optimizer, dataset, shards, self.ema)
        self.checkpoints = RunCheckpoints(settings, self.ranks, *held)
        self.skipping = Skipping(self.out, settings.max_skipped, self.ranks)
        self.pace = Pace(settings, ranks, self.budget)
        self._began = time.perf_counter()  # when training would have begun, had nothing interrupted it

    def run(self) -> Path:
        """Train until the budget is spent or a signal arrives. Returns the newest checkpoint folder."""
        lock = RunLock(self.out)
        with self.ranks.explained():
            if self.ranks.world > 1 and not self.shards:  # or they were compared when the model was cut
                checks = resolve_name(CHECKS)
                checks.check_facts(self.ranks, checks.facts(self.settings, self.progress.run, self.model))
            self.ranks.on_main(lock.acquire)
            try:
                return self._run(lock)
            finally:
                self.batches.close()
                self.checkpoints.saver.close()
                lock.release()

    def _run(self, lock: RunLock) -> Path:
        found = self.checkpoints.restore(self.progress.run, self._is_finished)
        self.progress = found or self.progress
        if found is None and self.settings.carry_optimizer:
            carry = resolve_name("training.run.state:carry_optimizer")
            self.ranks.say(carry(Path(self.settings.ckpt), self.model, self.optimizer, self.shards))
        if self.progress.finished and not self.progress.late:
            return self.checkpoints.finish_again(self.progress, self._end(self.progress))
        if self.settings.compiles(self.ranks.device):
            resolve_name("training.compiled:compile_layers")(self.model, self.settings.compile is not None)
        if self.ranks.main:
            if not self.progress.finished:
                self.pace.announce(self.model, self.dataset, self.counter.flops(), self.peak, self.dtype, self.progress)
            lock.sign()
            save_resolved(self.settings, self.out / "config.yaml")
        if self.samples:
            self.samples.begin(self.progress.step)
        log = open_log(self.settings, self.progress.step, self.ranks.main)
        with self.ranks.watch.listening(self.ranks.say), log:
            self.ranks.watch.show = log.doing
            with suppress(Stopped):  # the step it was in has changed nothing yet
                if self._measure_first(log, found is None):
                    self._loop(log)
        self.checkpoints.finish(self.progress, self._end(self.progress))
        if self.ranks.main:
            self._draw()
        return newest(self.out) or self.out

    def _measure_first(self, log: RunLog, fresh: bool) -> bool:
        """Validate before a fresh run's first step, or after a step whose validation a signal cut short.

        Returns False when a signal came meanwhile: what was cut short says nothing.
        """
        late, validates, began = self.progress.late, fresh and self.validation is not None, time.perf_counter()
        if validates or late:
            self.ranks.say("validating before the first step" if validates else f"validating step {late['step']}")
        measured = self._validate() if validates or late else {}
        if self.ranks.asked_to_stop():
            return False
        if validates:
            log.write(untrained_entry(measured))
        if fresh and self.samples and self.samples.due(0, validates, False):
            self.samples.write(self.model, 0, log.sampled)
        if late:
            self.progress.late = {}
            log.write({**late, **measured})
            self._judge(measured)
        if measured:
            self.pace.pause = time.perf_counter() - began
        return True

    def _loop(self, log: RunLog) -> None:
        """Do steps until the budget is spent or a signal came. Validating and saving are not training time."""
        settings, progress = self.settings, self.progress
        self._began = time.perf_counter() - progress.seconds
        window_tokens, window_seconds = progress.tokens, progress.seconds
        stop = False
        while not stop and not progress.finished:
            result, lr = self.advance()
            stop = result.shared["stop"] > 0
            if result.shared["failed"]:
                self.checkpoints.wait()  # raises the error of the save that has failed meanwhile
            every = settings.dist.check_every if self.ranks.world > 1 else 0
            if every and progress.step % every == 0:
                resolve_name(CHECKS).check_weights(self.ranks, self.model, progress.step)
            share = self.budget.progress(progress.step, progress.seconds, progress.tokens)
            progress.finished = share >= 1
            log.stepped(share, self.pace.left(share), measures(result))
            pause = time.perf_counter()
            validate = progress.finished or bool(settings.val_every and progress.step % settings.val_every == 0)
            if validate or progress.step == 1 or progress.step % settings.log_every == 0:
                rate = (progress.tokens - window_tokens) / max(progress.seconds - window_seconds, 1e-9)
                window_tokens, window_seconds = progress.tokens, progress.seconds
                reached = rate * self.counter.flops()
                if reached > self.peak:  # a neighbour on the machine made what was measured too low
                    self.peak = reached
                    self.ranks.say(f"notice: {reached / 1e9:,.0f} GFLOP/s is the machine's peak from here on, for mfu")
                entry = step_entry(result, progress, lr, rate, reached / self.peak, memory_used(self.ranks.device))
                log.tell(entry)
                measured = self._validate() if validate and not stop else {}
                stop = stop or (validate and self.ranks.asked_to_stop())  # what was cut short measures nothing
                if stop and validate and self.validation:
                    progress.late, progress.finished = entry, False  # to be logged with its validation on resume
                else:
                    log.write(entry if stop else {**entry, **measured})
                    if validate and not stop:
                        self._judge(measured)
            else:
                log.pulse(progress.step)
            validated = validate and self.validation is not None
            if self.samples and not stop and self.samples.due(progress.step, validated, progress.finished):
                self.samples.write(self.model, progress.step, log.sampled)
            if settings.save_every and progress.step % settings.save_every == 0 and not progress.finished:
                self.checkpoints.save(f"step-{progress.step}", progress)
            pause = time.perf_counter() - pause
            self.pace.pause = pause if validated else self.pace.pause
            self._began += pause

    def advance(self) -> tuple[StepResult, float]:
        """Train one optimizer step of the run and move its progress on. Returns its result and its learning rate."""
        lr, progress = self._set_rates(), self.progress
        self._replicate()
        step = OptimizerStep(
            self.settings, self.ranks, self.model, self.copies, self.dataset, self.batches, self.loss, self.optimizer,
            self.skipping, self.dtype, self._shared, None if self.pace.known else self.pace.report,
        )  # fmt: skip
        result = step.run(progress)
        if self.ema:
            self.ema.update()
        progress.step += 1
        progress.tokens += result.tokens
        progress.seconds = result.shared["seconds"]
        if self.budget.batches:
            progress.samples = self.batches.of_step(progress.step).start
        return result, lr

    @cached_property
    def batches(self) -> Batches:
        """The micro-batches of this rank, to be closed."""
        made_by_policy = isinstance(self.dataset, PolicyDataset)
        of_step = self.budget.batches.of_step if self.budget.batches else None
        return Batches(self.settings, self.ranks, self.dataset, self.loss, not made_by_policy, of_step)

    def _shared(self) -> dict[str, float]:
        """The main rank's clock, and whether any rank was asked to stop or could not save: all end at the same step."""
        seconds = time.perf_counter() - self._began if self.ranks.main else 0.0
        return {"seconds": seconds, "stop": self.ranks.watch.asked, "failed": self.checkpoints.saver.failed}

    def _set_rates(self) -> float:
        """Move the learning rate and the schedules of the loss along the run. Returns the learning rate.

        The rates of a step are those of its end, so that the first is not 0 and the last is the final one.
        """
        optim, progress = self.settings.optim, self.progress
        tokens = progress.tokens * (progress.step + 1) / max(progress.step, 1)  # if samples stay as long as they were
        share = max(self.budget.progress(progress.step + 1, progress.seconds, tokens), 1e-4)
        lr = learning_rate(share, optim.lr, optim.warmup, optim.decay_from, optim.final_lr_ratio, optim.tails)
        set_learning_rate(self.optimizer, lr)
        for name, schedule in self.settings.schedules.items():
            setattr(self.loss, name, value_at(schedule, share, name))
        return lr

    def _replicate(self) -> None:
        """Have the ranks train what takes part in the next step, and wrap the model again where that changes.

        MTP layers whose loss weighs nothing get no gradient, for which DistributedDataParallel would wait: they freeze.
        """
        runs_mtp = getattr(self.loss, "runs_mtp", None)
        if self.shards or (self.copies is not None and runs_mtp == self._trains_mtp):
            return
        if runs_mtp is not None:
            self.model.mtp.requires_grad_(runs_mtp)
        self._trains_mtp, self.copies = runs_mtp, None  # the memory of the buckets goes before new ones are made
        self.copies = Replicated(self.model, self.ranks, self.settings.dist.gradients)

    def _validate(self) -> dict[str, Any]:
        """Return what the validation measures now; empty without one."""
        if self.validation is None:
            return {}
        self.model.eval()

        def measure(model: MiniDeepSeek) -> dict[str, Any]:
            return self.validation(model, self.dtype, self.ranks)

        def measured() -> dict[str, Any]:
            return self.copies.measure(measure) if self.shards else measure(self.model)

        entry = measured()
        if self.ema and self.progress.step:
            with self.ema.in_place():
                entry |= {f"ema_{name}": value for name, value in measured().items() if name.startswith("val_")}
        self.model.train()
        return entry

    def _judge(self, held_out: dict[str, Any]) -> None:
        """Keep the best checkpoint and end where patience does, by the main rank's numbers: no bit may part ranks."""
        better = self.progress.judge(self.ranks.on_main(lambda: held_out))
        self.progress.finished = bool(self._end(self.progress))
        if better and self.settings.keep_best:
            self.checkpoints.save(BEST, self.progress)

    def _is_finished(self, progress: Progress) -> bool:
        """Return whether a run that is resumed is over; what is left of it is laid out from where it is."""
        self.budget.resume(progress.step, progress.samples)
        return bool(self._end(progress))

    def _draw(self) -> None:
        resolve_name("training.run.plots:draw_run")(self.out)

    def _end(self, progress: Progress) -> str:
        """Return what has ended a run that is so far; empty while nothing has."""
        spent, patience = (progress.step, progress.seconds, progress.tokens), self.settings.patience
        if self.budget.progress(*spent) >= 1:
            return self.budget.first(*spent)
        return f"--patience {patience}" if patience and progress.stale >= patience else ""
