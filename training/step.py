"""One optimiser step: micro-batches accumulated, divided by the count of all ranks, clipped, applied or left out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from errors import naming
from model import MiniDeepSeek
from text.order import scramble
from training.batches import Batches
from training.losses import Batch, Loss
from training.machine import autocast, set_seed
from training.metrics import StepResult, Sums, Tally
from training.optim.build import step_scaled
from training.parallel.ranks import Ranks
from training.parallel.replication import Replicated
from training.router_bias import update_router_biases
from training.run.interrupt import Stopped
from training.run.progress import Progress
from training.settings import StageSettings

if TYPE_CHECKING:
    from training.parallel.sharding import Sharded, Shards

SKIPPED = "skipped.jsonl"
SHOWN = 8  # samples that the message at the end of a run names
Part = tuple[range, Tensor, Tensor]  # of a micro-batch: indices of its samples, loss, count


class Dataset(Protocol):
    """What a stage trains on: sample `i`, counted from the start of training, is a function of (seed, i) alone.

    Its positions are the tokens of a run, unless it is a `CountingDataset`.
    """

    def __len__(self) -> int: ...

    def batch(self, indices: list[int]) -> Batch: ...


@runtime_checkable
class NamingDataset(Protocol):
    """A data set that can say where sample `index` comes from."""

    def describe(self, index: int) -> str: ...


@runtime_checkable
class CountingDataset(Protocol):
    """A data set that says itself how many tokens of a run a batch on the device has."""

    def count_tokens(self, batch: Batch) -> int: ...


@runtime_checkable
class ShardedUser(Protocol):
    """A data set, or what checkpoints hold, that uses the weights itself: told once where ranks hold shards of them."""

    def take_shards(self, shards: Shards) -> None: ...


@runtime_checkable
class PolicyDataset(Protocol):
    """A data set that the model in training makes, such as its own answers.

    `prepare` is called on every rank at the start of every step, before the step's batches are asked for, and returns
    entries for the log. What later steps need of earlier ones is in `state`, the same on every rank: it is saved with
    each checkpoint, and a resumed run gives it to `load_state` before its first step.
    """

    def prepare(self, step: int, model: MiniDeepSeek) -> dict[str, Any]: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


def positions(batch: Batch) -> int:
    """Return how many go through the network, whether they count or not."""
    return batch["input_ids"].numel()


class Skipping:
    """Records steps without a finite loss and gradient. All ranks skip a step or none: they look at sums over all."""

    def __init__(self, out: Path, most: int, ranks: Ranks) -> None:
        """most: steps skipped in a row that end the run."""
        self._path, self._most, self._ranks = out / SKIPPED, most, ranks
        self.in_a_row = 0

    def skip(self, step: int, result: StepResult, parts: Sequence[Part], dataset: Dataset) -> None:
        """Write down a step that is left out, with the samples of the micro-batches that it is due to.

        step: its number, from 1; parts: the micro-batches of this rank. Raises `UserError` for one step too many.
        """
        self.in_a_row += 1
        bad = [list(indices) for indices, total, count in parts if not (total.isfinite() & count.isfinite()).item()]
        found = [indices for rank in self._ranks.gather(bad) for indices in rank]
        if not found:  # every loss is finite: the gradient alone overflowed, in whichever micro-batch
            found = [indices for rank in self._ranks.gather([list(part[0]) for part in parts]) for indices in rank]
        describe = dataset.describe if isinstance(dataset, NamingDataset) else lambda index: f"sample {index}"
        samples = [describe(index) for indices in found for index in indices]
        if self._ranks.main:
            entry = {"step": step, "loss": str(result.loss), "grad_norm": str(result.grad_norm), "samples": samples}
            with naming(self._path), open(self._path, "a", encoding="utf8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        what = f"loss {result.loss}, gradient norm {result.grad_norm}"
        self._ranks.say(f"step {step:>6}  skipped: {what}; its {len(samples)} samples are in {self._path}")
        if self.in_a_row >= self._most:
            self._ranks.fail(
                f"{self._path}: {self.in_a_row} steps in a row had no finite loss or gradient ({what}; the last on "
                f"{'; '.join(samples[:SHOWN])}); look at these samples, or lower --optim.lr and use --resume"
            )


@dataclass
class OptimizerStep:
    """One step of a stage, the same however it is cut into micro-batches and ranks.

    Attributes:
        copies: of `model`, on all ranks. dtype: of the products.
        share: gives numbers that all ranks are to know the sums of: `StepResult.shared`.
        report_pace: takes the seconds of the first of several micro-batches and its rows, or None.
        parts: the micro-batches that are done; made: log entries of a `PolicyDataset`.
    """

    settings: StageSettings
    ranks: Ranks
    model: MiniDeepSeek
    copies: Replicated | Sharded
    dataset: Dataset
    batches: Batches
    loss: Loss
    optimizer: torch.optim.Optimizer
    skipping: Skipping
    dtype: torch.dtype
    share: Callable[[], dict[str, float]] = dict
    report_pace: Callable[[float, int], None] | None = None
    parts: list[Part] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)
    _tokens: int = 0

    def run(self, progress: Progress) -> StepResult:
        """Do the step after `progress.step`. Raises `Stopped` where a signal came before its last micro-batch."""
        if isinstance(self.dataset, PolicyDataset):
            self.made = self.copies.measure(lambda model: self.dataset.prepare(progress.step, model))
        began = time.perf_counter()
        tally = self.accumulate(progress.step)
        gradients = self.copies.gradients()
        shared = self.share()
        told = {"squares": self.copies.squares(gradients), "tokens": self._tokens}
        sums = tally.gather(self.ranks, **told, **shared)
        shared = {name: sums.take(name) for name in shared}
        result, factor = self.normalise_and_clip(sums)
        result.shared = shared
        if self.step_or_skip(result, factor, gradients, progress):
            update_router_biases(self.model, sums.on_device.get("counts"), getattr(self.loss, "bias_speed", 0.0))
        if self.made:
            seconds = max(time.perf_counter() - began, 1e-9)
            result.extra = {**self.made, "train_tokens_per_second": result.tokens / seconds}
        return result

    def accumulate(self, step: int) -> Tally:
        """Add up gradients, in `.grad`, and sums of loss, count and metrics over micro-batches. Waits for no GPU.

        Gradients are those of the loss sum over the nominal number of labels, averaged over ranks.
        """
        ranks, tally, micro_batches = self.ranks, Tally(), self.batches.samples(step)
        if self.copies.pipeline:
            return self._accumulate_in_stages(step, micro_batches, tally)
        last = len(micro_batches) - 1
        count_tokens = self.dataset.count_tokens if isinstance(self.dataset, CountingDataset) else positions
        for index, indices in enumerate(micro_batches):
            if index and index < last and ranks.watch.asked and not ranks.in_step:
                continue
            # In the last one gradients are exchanged: before it the ranks agree whether to leave this step.
            if index and (index == last or ranks.in_step) and ranks.asked_to_stop():
                raise Stopped
            ranks.watch.show(*(f"step {step + 1}, micro-batches", index, last + 1) if last else ("", 0, 0))
            began = time.perf_counter()
            batch = self.batches.take(step, index)
            self._seed(step, index)
            with self.copies.accumulating(index < last):
                with autocast(self.dtype, ranks.device):
                    loss, count, metrics = self.copies.compute(self.loss, batch)
                # Outside: autocast would round what the router's products in float32 get back.
                (loss / self._nominal).backward()
            if last and self.report_pace and ranks.device.type == "cpu":  # a GPU has not yet computed it
                self.report_pace(time.perf_counter() - began, len(indices))
                self.report_pace = None
            self.parts.append((indices, loss.detach(), count))
            self._tokens += count_tokens(batch)
            tally.add({"loss": loss, "count": count, **metrics})
        return tally

    def _accumulate_in_stages(self, step: int, micro_batches: list[range], tally: Tally) -> Tally:
        """`accumulate` in a pipeline, whose schedule does all micro-batches: those of one are computed side by side."""
        if self.ranks.asked_to_stop():
            raise Stopped
        self.ranks.watch.show(f"step {step + 1}, micro-batches", 0, len(micro_batches))
        batches = [self.batches.take(step, index) for index in range(len(micro_batches))]
        measured = self.copies.compute_all(self.loss, batches, self._nominal, partial(self._seed, step))
        for indices, (loss, count, metrics) in zip(micro_batches, measured, strict=True):
            tally.add({"loss": loss, "count": count, **metrics})
            if self.copies.pipeline.last is not None:  # elsewhere these are zeros
                self.parts.append((indices, loss, count))
                self._tokens += positions(batches[0])
        return tally

    def _seed(self, step: int, *place: int) -> None:
        """What dropout draws is a function of these numbers, like the order of the data: a resumed run draws it too.

        place: of a micro-batch, and in a pipeline of a stage.
        """
        set_seed(scramble(self.settings.seed, step, *place, self.ranks.rank) >> 1, self.ranks.device)

    def normalise_and_clip(self, sums: Sums) -> tuple[StepResult, float]:
        """Divide by the count of the whole step, over all ranks.

        Returns also what gradients are to be multiplied by, so that they are divided by it and their norm is clipped.
        """
        labels, norm = sums.take("count"), math.sqrt(sums.take("squares"))
        count = max(labels, 1)
        # DDP averaged over ranks, and each micro-batch was divided by the nominal number of labels.
        scale = self._nominal * self.copies.averaged_over / count
        norm *= scale
        factor = scale * min(self.settings.optim.clip / (norm + 1e-6), 1.0)
        tokens, counts = int(sums.take("tokens")), sums.on_host.pop("counts", None)
        means = sums.means(count)
        return StepResult(means.pop("loss"), norm, int(labels), tokens, means, counts), factor

    def step_or_skip(self, result: StepResult, factor: float, gradients: Sequence[Tensor], progress: Progress) -> bool:
        """Update the weights, or leave the step out where loss or gradient is not finite. Returns which it was."""
        if finite := math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            self.skipping.in_a_row = 0
            step_scaled(self.optimizer, gradients, factor)
        else:
            progress.skipped += 1
            self.skipping.skip(progress.step + 1, result, self.parts, self.dataset)
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    @property
    def _nominal(self) -> int:
        """Labels of the largest step, if every position has one."""
        return self.settings.rows * self.settings.row_tokens
