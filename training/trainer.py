"""The one loop of all stages: batches in, optimiser steps, the router's bias, logs, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from errors import UserError
from model import MiniDeepSeek
from model.costs import count as count_costs
from model.moe import update_bias
from model.ops import kernel_report
from text.order import scramble
from text.tokenizer import Tokenizer
from training.batch import fit_batch, warn_of_few_steps
from training.datasets import Dataset, PolicyDataset
from training.flops import Work
from training.losses import Batch, Loss
from training.machine import Peak, autocast, choose_dtype, peak_memory, set_seed
from training.metrics import StepResult, announcement, step_entry, untrained_entry
from training.optim.build import build_optimizer, set_learning_rate
from training.parallel.rank_checks import check_facts, check_weights, facts
from training.parallel.ranks import Ranks
from training.run.best import judge
from training.run.carried import carry_optimizer
from training.run.checkpoint import Progress, Weights
from training.run.console import duration
from training.run.estimate import SLOW_STEP, estimate, length
from training.run.interrupt import Interrupt, aftermath
from training.run.lock import RunLock
from training.run.log import RunLog
from training.run.plots import draw_run
from training.run.quiet import quiet_compiler
from training.run.resume import BEST, WholeModel, identity
from training.run.run_checkpoints import RunCheckpoints
from training.run.samples import Samples
from training.run.watch import Stopped
from training.schedule import learning_rate, value_at
from training.settings import StageSettings, save_resolved
from training.skipping import Skipping
from training.tally import Tally
from training.validation import Validation


class Trainer:
    """Runs a stage to the end of its budget, from the newest checkpoint when resuming.

    Args:
        model: fp32 weights; those without `requires_grad` stay as they are.
        dataset: samples of at most `settings.row_tokens` positions; a `PolicyDataset` makes them step by step.
        loss: returns (sum, count, metrics); sums are divided by the count of the whole step.
        validation: measures held-out data before the first step, every `val_every` steps and after the last, or None.
        weights: what checkpoints hold, if it is not the whole model.
        optimizer: if it is not AdamW over all weights with `requires_grad`.
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
        optimizer: torch.optim.Optimizer | None = None,
        samples: Samples | None = None,
    ) -> None:
        self.settings, self.ranks, self.tokenizer = settings, ranks, tokenizer
        self.dtype = choose_dtype(settings.dtype, ranks.device)
        self.peak = Peak(self.dtype, ranks)
        self.model = model.to(ranks.device)
        self.model.gradient_checkpointing = settings.gradient_checkpointing
        self.dataset, self.loss, self.validation, self.samples = dataset, loss, validation, samples
        self.out = Path(settings.out)
        fit_batch(settings, ranks, len(dataset))
        settings.check_fit(ranks.world, model.config.max_position_embeddings)
        if validation is None and (settings.keep_best or settings.patience):
            raise UserError("--keep_best and --patience: nothing is held out to measure on; give --val_fraction")
        self.budget = settings.budget(len(dataset))
        self.module: torch.nn.Module | None = None
        self.progress = Progress(run=identity(settings, tokenizer, dataset))
        self.optimizer = optimizer or build_optimizer(self.model, settings.optim)
        weights = weights or WholeModel(self.model)
        self.checkpoints = RunCheckpoints(settings, ranks, weights, tokenizer, self.optimizer, dataset)
        self.interrupt = Interrupt(ranks)
        self.warned = self.timed = False  # of slow steps; how long a micro-batch takes
        self.skipping = Skipping(self.out, settings.max_skipped, ranks, dataset)

    def run(self) -> Path:
        """Train until the budget is spent or a signal arrives. Returns the newest checkpoint folder."""
        lock = RunLock(self.out)
        with self.ranks.explained():
            check_facts(self.ranks, facts(self.settings, self.progress.run, self.model))
            self.ranks.on_main(lock.acquire)
            try:
                return self._run(lock)
            finally:
                self.checkpoints.close()
                lock.release()

    def _run(self, lock: RunLock) -> Path:
        found = self.checkpoints.take_up(self.progress.run, lambda progress: bool(self._end(progress)))
        self.progress = found or self.progress
        if found is None and self.settings.carry_optimizer:
            self.ranks.say(carry_optimizer(Path(self.settings.ckpt), self.model, self.optimizer))
        if self.progress.finished:
            final = self.out / "final"
            if self.ranks.on_main(lambda: self.checkpoints.newest() == final):
                done = f"already complete after {self.progress.step} steps ({self._end(self.progress)})"
                self.ranks.say(f"{self.out}: {done}; raise the budget to go on")
            else:  # it was interrupted where this budget ends
                self._finish()
            return final
        if self.settings.compile:
            quiet_compiler()
            for layer in [*self.model.model.layers, *self.model.mtp]:
                layer.compile(dynamic=False)
        warn_of_few_steps(self.settings, self.ranks, len(self.dataset))
        work = Work(self.model, self.loss)
        flops = partial(work.flops, self.settings.sequence_length)
        if self.ranks.main:
            self._announce(flops())
            lock.sign()
            save_resolved(self.settings, self.out / "config.yaml")
        if self.samples:
            self.samples.begin(self.progress.step)
        log = RunLog(self.out, self.progress.step, self.ranks.main, self.settings.wandb, asdict(self.settings))
        late = log.take_back() if self.progress.unmeasured else {}
        with self.interrupt, log:
            self.ranks.watch.show = log.doing
            with suppress(Stopped):  # the step it was in has changed nothing yet
                self._loop(log, found is None, late, lambda rate: self.peak.share(rate * flops()))
        self._finish()
        if self.ranks.main:
            draw_run(self.out)
        return self.checkpoints.newest() or self.out

    def _announce(self, flops: int) -> None:
        """Say what runs, and what it will take where a token takes so many FLOPs."""
        settings, ranks, config = self.settings, self.ranks, self.model.config
        costs, peak = count_costs(config, settings.sequence_length), self.peak.rate
        kernels = kernel_report(config, self.dtype, ranks.device, settings.row_tokens, settings.compile)
        takes = estimate(settings, self.budget, self.model, flops, peak, ranks.device, self.dtype)
        apart = ", sampling apart" if isinstance(self.dataset, PolicyDataset) else ""
        ranks.say(announcement(settings, ranks, self.budget, costs, self.dtype, peak, kernels, takes) + apart)
        self._warn_of_slow_steps(takes.step)

    def _warn_of_slow_steps(self, seconds: float) -> None:
        """Say once what helps where a step takes so long that nobody would wait for the first."""
        if seconds > SLOW_STEP and not self.warned:
            self.warned = True
            remedy = self.settings.lighten(self.ranks.device.type)
            self.ranks.say(f"warning    a step takes about {duration(seconds)} here: {remedy}")

    def _report_pace(self, seconds: float, count: int) -> None:
        """The first of `count` micro-batches took so long: say what that makes of the step, where it is long."""
        self.timed = True
        step = seconds * count
        if step > SLOW_STEP / 3:
            _, whole = length(self.budget, step, self.settings.rows * self.settings.row_tokens)
            pace = f"about {duration(step)} a step, {duration(whole)} for the whole run"
            self.ranks.say(f"measured   micro-batch 1 of {count} took {duration(seconds)}: {pace}")
            self._warn_of_slow_steps(step)

    def _loop(self, log: RunLog, fresh: bool, late: dict[str, Any], mfu: Callable[[float], float]) -> None:
        """Steps until the budget is spent or a signal came. Validating and saving are not training time.

        late: the log entry of a step whose validation a signal prevented; it is made up for first.
        """
        settings, progress = self.settings, self.progress
        measures = fresh and self.validation is not None
        if measures:
            self.ranks.say("validating before the first step")
        measured = self._validate() if measures else {}
        stop = self.ranks.asked_to_stop()
        if measures and not stop:
            log.write(untrained_entry(measured))
        if fresh and self.samples and not stop and self.samples.due(0, measures, False):
            self.samples.write(self.model, 0, log.dim)
        if progress.unmeasured:
            measured = self._validate()
            stop = progress.unmeasured = self.ranks.asked_to_stop()
            log.write(late if stop else {**late, **measured})
            if not stop:
                self._judge(measured)
        log.begin(self.budget.progress(progress.step, progress.seconds, progress.tokens), progress.seconds)
        origin = time.perf_counter() - progress.seconds
        window_tokens, window_seconds = progress.tokens, progress.seconds
        while not stop and not progress.finished:
            # The rate of a step is that of its end, so that the first is not 0 and the last is the final one.
            after = progress.tokens * (progress.step + 1) / max(progress.step, 1)  # of samples as long as those before
            lr = self._set_rates(max(self.budget.progress(progress.step + 1, progress.seconds, after), 1e-4))
            self._wrap()
            result = self._step()
            progress.step += 1
            progress.tokens += result.positions
            progress.seconds, stop = self._agree(time.perf_counter() - origin)
            if settings.dist.check_every and progress.step % settings.dist.check_every == 0:
                check_weights(self.ranks, self.model, progress.step)
            share = self.budget.progress(progress.step, progress.seconds, progress.tokens)
            progress.finished = share >= 1
            log.stepped(share, progress.seconds, result.metrics.get("main", result.loss))
            pause = time.perf_counter()
            validate = progress.finished or bool(settings.val_every and progress.step % settings.val_every == 0)
            if validate or progress.step == 1 or progress.step % settings.log_every == 0:
                rate = (progress.tokens - window_tokens) / max(progress.seconds - window_seconds, 1e-9)
                window_tokens, window_seconds = progress.tokens, progress.seconds
                entry = step_entry(result, progress, lr, rate, mfu(rate), peak_memory(self.ranks.device))
                measured = self._validate() if validate and not stop else {}
                stop = stop or (validate and self.ranks.asked_to_stop())  # what was cut short measures nothing
                log.write(entry if stop else {**entry, **measured})
                progress.unmeasured = validate and stop
                if validate and not stop:
                    self._judge(measured)
            else:
                log.pulse(progress.step)
            validated = validate and self.validation is not None
            if self.samples and not stop and self.samples.due(progress.step, validated, progress.finished):
                self.samples.write(self.model, progress.step, log.dim)
            if settings.save_every and progress.step % settings.save_every == 0 and not progress.finished:
                self.checkpoints.save(f"step-{progress.step}", progress)
            origin += time.perf_counter() - pause

    def _step(self) -> StepResult:
        """One optimiser step: accumulate, normalise by the whole count, clip, update weights and router biases."""
        ranks, per_rank, micro_rows = self.ranks, self.settings.rows // self.ranks.world, self.settings.micro_rows
        is_made = isinstance(self.dataset, PolicyDataset)
        extra = self.dataset.prepare(self.progress.step, self.model) if is_made else {}
        prepared = time.perf_counter() if extra else 0.0
        first = self.progress.step * self.settings.rows
        # Rank r takes a contiguous share of the step's samples, so the sum over ranks is the sum over the batch.
        mine = range(first + ranks.rank * per_rank, first + (ranks.rank + 1) * per_rank)
        micro = [mine[start : start + micro_rows] for start in range(0, per_rank, micro_rows)]
        nominal = self.settings.rows * self.settings.row_tokens
        tally, parts = Tally(), []
        last = len(micro) - 1
        for index, indices in enumerate(micro):
            if index and index < last and ranks.watch.asked:
                continue
            # In the last one gradients are exchanged: before it the ranks agree whether to leave this step.
            if index and index == last and ranks.asked_to_stop():
                raise Stopped
            ranks.watch.show(f"micro-batch {index + 1}/{len(micro)}" if last else "")
            began = 0.0 if self.timed or not last else time.perf_counter()
            batch = self._move(self.dataset.batch(list(indices)))
            # What dropout draws is a function of these numbers, like the order of the data: a resumed run draws it too.
            set_seed(scramble(self.settings.seed, self.progress.step, index, ranks.rank) >> 1, ranks.device)
            with ranks.no_sync(self.module, index < last):
                with autocast(self.dtype, ranks.device):
                    loss, count, metrics = self.loss(self.module, batch)
                # Outside: autocast would round what the router's products in float32 get back.
                (loss / nominal).backward()
            if began and ranks.device.type == "cpu":  # a GPU has not yet computed it
                self._report_pace(time.perf_counter() - began, len(micro))
            parts.append((indices, loss.detach(), count))
            positions = torch.full((), batch["input_ids"].numel(), device=ranks.device)
            for name, value in {"loss": loss, "count": count, "positions": positions, **metrics}.items():
                tally.add(name, value)
        tally.gather(ranks)
        labels, positions, counts = (tally.take(name) for name in ("count", "positions", "counts"))
        count = max(labels.item(), 1)
        # DDP averaged over ranks, and each micro-batch was divided by the nominal number of labels.
        scale = nominal * ranks.world / count
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        means, norm = tally.means(count), torch.nn.utils.get_total_norm(gradients).item() * scale
        if (factor := scale * min(self.settings.optim.clip / (norm + 1e-6), 1.0)) != 1.0:
            torch._foreach_mul_(gradients, factor)
        if math.isfinite(means["loss"]) and math.isfinite(norm):
            self.skipping.went_well()
            self.optimizer.step()
            if counts is not None and self.bias_speed:
                for router, load in zip(self.model.routers(), counts, strict=False):
                    update_bias(router.e_score_correction_bias, load, self.bias_speed)
        else:
            self.progress.skipped += 1
            self.skipping.skip(self.progress.step + 1, means["loss"], norm, parts)
        self.optimizer.zero_grad(set_to_none=True)
        if extra:
            seconds = max(time.perf_counter() - prepared, 1e-9)
            extra = {**extra, "train_tokens_per_second": positions.item() / seconds}
        return StepResult(means.pop("loss"), norm, int(labels.item()), int(positions.item()), means, counts, extra)

    def _set_rates(self, share: float) -> float:
        """Move the learning rate, the bias speed and what the loss has of the schedules along the run."""
        settings = self.settings
        lr = learning_rate(
            share, settings.optim.lr, settings.optim.warmup, settings.optim.decay_from, settings.optim.final_lr_ratio
        )
        set_learning_rate(self.optimizer, lr)
        values = {name: value_at(schedule, share, name) for name, schedule in settings.schedules.items()}
        self.bias_speed = values.pop("bias_speed", 0.0)
        for name, value in values.items():
            if hasattr(self.loss, name):
                setattr(self.loss, name, value)
        return lr

    def _wrap(self) -> None:
        """Have the ranks train what takes part in the next step, and wrap the model again where that changes.

        MTP layers whose loss weighs nothing get no gradient, for which DistributedDataParallel would wait: they freeze.
        """
        runs_mtp = getattr(self.loss, "runs_mtp", None)
        if self.module is not None and runs_mtp == self._trains_mtp:
            return
        if runs_mtp is not None:
            self.model.mtp.requires_grad_(runs_mtp)
        self._trains_mtp, self.module = runs_mtp, None  # the memory of the buckets goes before new ones are made
        self.module = self.ranks.wrap(self.model)

    def _validate(self) -> dict[str, Any]:
        """What the validation measures now; empty without one."""
        if self.validation is None:
            return {}
        self.model.eval()
        entry = self.validation(self.model, self.dtype, self.ranks)
        self.model.train()
        return entry

    def _judge(self, held_out: dict[str, Any]) -> None:
        """Keep the best checkpoint and end where patience does, by the main rank's numbers: no bit may part ranks."""
        better = judge(self.progress, self.ranks.on_main(lambda: held_out))
        self.progress.finished = bool(self._end(self.progress))
        if better and self.settings.keep_best:
            self.checkpoints.save(BEST, self.progress)

    def _end(self, progress: Progress) -> str:
        """What has ended a run that is so far; empty while nothing has."""
        patience = self.settings.patience
        if self.budget.progress(progress.step, progress.seconds, progress.tokens) >= 1:
            return self.budget.first(progress.step, progress.seconds, progress.tokens)
        return f"--patience {patience}" if patience and progress.stale >= patience else ""

    def _finish(self) -> None:
        """Save the end of the run, or the point where it was interrupted."""
        name = "final" if self.progress.finished else f"step-{self.progress.step}"
        self.checkpoints.wait()  # that of this step may be under way
        if not self.progress.step:
            self.ranks.say(f"interrupted: before the first step, so that there is nothing to save{aftermath()}")
            return
        if self.progress.finished or not self.ranks.on_main((self.out / name).is_dir):
            self.checkpoints.save(name, self.progress)
        self.checkpoints.wait()
        if not self.progress.finished:
            saved = f"saved {self.out / name}; the same command with --resume goes on from there"
            self.ranks.say(f"interrupted: {saved}{aftermath()}")
        else:
            done = f"{self.progress.step} steps, {self.progress.tokens:,} tokens (ended by {self._end(self.progress)})"
            self.ranks.say(f"finished: {self.out / name} after {done}")
            if self.settings.keep_best and (best := self.progress.best):
                value = f"{best['measure']} {best['value']:.4f}"
                self.ranks.say(f"best: {self.out / BEST} of step {best['step']}, {value}")

    def _agree(self, seconds: float) -> tuple[float, bool]:
        """Rank 0's clock, and whether any rank was told to stop: all ranks must end at the same step.

        Raises the error of a save that has failed meanwhile.
        """
        mine = [seconds if self.ranks.main else 0.0, float(self.interrupt.asked), float(self.checkpoints.failed)]
        mine = torch.tensor(mine, dtype=torch.float64).to(self.ranks.device)
        elapsed, stop, failed = self.ranks.sum(mine).tolist()
        if failed:
            self.checkpoints.wait()
        return elapsed, stop > 0

    def _move(self, batch: Batch) -> Batch:
        if self.ranks.device.type != "cuda":
            return batch
        return {key: value.pin_memory().to(self.ranks.device, non_blocking=True) for key, value in batch.items()}
