"""The checkpoints of one run: restored at its beginning, written in the background while training continues."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import torch

from errors import folded, naming
from text.tokenizer import Tokenizer
from training.parallel.ranks import Ranks
from training.run.checkpoint import Snapshot, Weights
from training.run.interrupt import aftermath
from training.run.lines import counted, held_out_text
from training.run.log import read_metrics
from training.run.progress import BEST, MEASURES, Progress, holds_run, keep_last, newest
from training.settings import StageSettings
from training.step import Dataset, PolicyDataset

if TYPE_CHECKING:
    from training.optim.ema import ExponentialMovingAverage
    from training.parallel.sharding import Shards

MEAN = "final-ema"
Tensors = dict[str, Any]  # tensors, or tables of them, by name


class Saver:
    """Saves one checkpoint at a time, in a thread, from a copy of its tensors.

    The copy is made by the stager of torch.distributed.checkpoint, which keeps its memory (page-locked beside a GPU)
    for the next one. Its writers are not used: a folder that transformers opens, and that has its name only when it
    is whole, is not what they write.
    """

    def __init__(self, background: bool, device: torch.device) -> None:
        """background: or the caller waits, and no copy is made. device: where the tensors are."""
        self._stager = self._thread = None
        if background:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions  # slow to import

            self._stager = DefaultStager(StagingOptions(device.type == "cuda", False, False, False))
            threads = torch.get_num_threads()
            self._thread = ThreadPoolExecutor(1, "saver", _step_back)
            self._thread.submit(int).result()
            torch.set_num_threads(threads)  # the number that threads begin with is one for all
        self._running: Future[None] | None = None

    def save(self, tensors: Tensors, write: Callable[[Tensors], None]) -> None:
        """Have `write` called with a copy of the tensors. Raises the `UserError` of the save before this one."""
        self.wait()
        if self._stager is None or self._thread is None:
            write(tensors)
        else:
            self._running = self._thread.submit(write, self._stager.stage(tensors))

    @property
    def failed(self) -> bool:
        """Return whether a save has failed in the thread; `wait` raises why."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def wait(self) -> None:
        """Until what is being written is on the disk. Raises the `UserError` of a save that failed."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def close(self) -> None:
        """Wait, whatever became of it, and give the copy's memory back."""
        if self._stager is not None and self._thread is not None:
            self._thread.shutdown()
            self._stager.close()


def _step_back() -> None:
    """Run torch's operations of this thread on it alone, and give training the processor first (on Linux).

    Otherwise the first of them starts a second pool of OpenMP threads, which stays. With more threads than cores OpenMP
    no longer lets those of training spin between two pieces of work: a step's small operations take twice as long.
    """
    torch.get_num_threads()  # a thread takes the common number when it is first asked
    torch.set_num_threads(1)
    if sys.platform == "linux":  # where each thread has its own priority
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class RunCheckpoints:
    """What is saved of a run, and read of it again. All ranks call these together.

    The main one writes; where ranks hold shards, each writes its share, and the main one what makes it a checkpoint.

    Attributes: saver: writes them.
    """

    def __init__(
        self,
        settings: StageSettings,
        ranks: Ranks,
        weights: Weights,
        tokenizer: Tokenizer,
        optimizer: torch.optim.Optimizer,
        dataset: Dataset,
        shards: Shards | None = None,
        ema: ExponentialMovingAverage | None = None,
    ) -> None:
        self._ema = ema
        self._out, self._settings, self._ranks = Path(settings.out), settings, ranks
        self._weights, self._tokenizer, self._optimizer, self._shards = weights, tokenizer, optimizer, shards
        self._made = dataset if isinstance(dataset, PolicyDataset) else None
        self.saver = Saver(settings.background_save, ranks.device)
        self._agree = resolve_name("training.parallel.saved:Agreement")(ranks) if shards else _alone

    def restore(self, run: dict[str, object], is_finished: Callable[[Progress], bool]) -> Progress | None:
        """Put the newest one in place, if asked to and there is one. Returns how far the run is, or None.

        A run that is complete is left as it is; one that `is_finished` without that is put in place, to be saved as its
        end. run: what must not have changed since.
        """
        out, found = self._out, None
        if self._ranks.on_main(lambda: holds_run(out)):
            resume = resolve_name("training.run.resume")
            found = self._ranks.on_main(lambda: resume.find_checkpoint(out, self._settings.resume, run))
        if found is None:
            return None
        folder, progress = found
        progress.finished = is_finished(progress)
        if progress.finished and folder.name == "final":
            return progress
        self._ranks.check_shared(folder, lambda: resume.contents(folder))
        self._weights.load(folder)
        load = resolve_name("training.run.state:load_training_state")
        state = load(folder, self._weights.model, self._optimizer, self._shards)
        if self._ema is not None:
            self._ema.load_state(state)
        if self._made is not None:
            self._made.load_state(state)
        self._ranks.gather(None)  # where another one could not read it, this says so
        self._ranks.say(f"resuming from {folder}: step {progress.step}, {progress.tokens:,} tokens")
        return progress

    def save(self, name: str, progress: Progress) -> None:
        """Begin to write one of this moment; an error of the one before it comes up here."""
        data = {} if self._made is None else self._made.state()
        data |= {} if self._ema is None else self._ema.state()
        self.wait()
        snapshot = Snapshot(self._weights, self._tokenizer, self._optimizer, progress, data, self._shards)

        def write(tensors: Tensors) -> None:
            snapshot.write(self._out / name, tensors, self._ranks.main, self._agree)
            if self._ranks.main and name not in ("final", BEST):
                keep_last(self._out, self._settings.keep)

        self._each(lambda: self.saver.save(snapshot.tensors, write))

    def _each(self, work: Callable[[], None]) -> None:
        """Call `work` on the main rank, and on those that hold shards; an error of the main one's ends all."""
        if self._shards and not self._ranks.main:
            work()
        self._ranks.on_main(work)

    def _save_mean(self, ema: ExponentialMovingAverage) -> None:
        """Write the model with the mean of its weights: a folder to open, with no run in it to resume."""
        folder = self._out / MEAN

        def write(tensors: Tensors) -> None:
            temporary = folder.with_name(f".{MEAN}.partial")
            with naming(folder):
                if self._ranks.main:
                    shutil.rmtree(temporary, ignore_errors=True)
                self._agree(temporary.mkdir if self._ranks.main else lambda: None)
                self._agree(lambda: self._weights.write(tensors, temporary) if tensors else None)
                if self._ranks.main:
                    self._tokenizer.save(temporary)
                    shutil.rmtree(folder, ignore_errors=True)
                    temporary.replace(folder)

        with ema.in_place():
            tensors = dict(self._weights.tensors())
            self._each(lambda: write(tensors))
        self._ranks.say(f"mean: {folder}, of the weights of the last steps (--ema_decay {ema.decay:g})")

    def wait(self) -> None:
        """Until what is being written is on the disk. Raises the error of a save that failed, on all ranks."""
        self._each(self.saver.wait)

    def finish_again(self, progress: Progress, end: str) -> Path:
        """Save the end of a run that was interrupted where its budget ends now, or say that it is there already."""
        final = self._out / "final"
        if not self._ranks.on_main(lambda: newest(self._out) == final):
            self.finish(progress, end)
        else:
            done = f"already complete after {counted(progress.step, 'step')} ({end})"
            self._ranks.say(f"{self._out}: {done}; raise the budget to train further")
        return final

    def finish(self, progress: Progress, end: str) -> None:
        """Save the end of the run, which `end` has brought about, or the point where it was interrupted, and say so."""
        say, folder = self._ranks.say, self._out / ("final" if progress.finished else f"step-{progress.step}")
        self.wait()  # that of this step may be under way
        if not progress.step:
            say(f"interrupted: before the first step, so that there is nothing to save{aftermath()}")
            return
        if progress.finished or not self._ranks.on_main(folder.is_dir):
            self.save(folder.name, progress)
        self.wait()
        if progress.finished and self._ema is not None:
            self._save_mean(self._ema)
        if not progress.finished:
            say(f"interrupted: saved {folder}; the same command with --resume continues from there{aftermath()}")
            return
        say(f"finished: {folder} after {counted(progress.step, 'step')}, {progress.tokens:,} tokens (ended by {end})")
        if self._settings.keep_best and (best := progress.best):
            before, reached = self._ranks.on_main(lambda: first_and_best(self._out, best))
            say(f"best: {self._out / BEST} of step {best['step']}, {reached}")
            if before:
                said = "notice: no validation was better than before training: held-out rows show nothing learned"
                say(folded(f"{said}; {before} at step 0, {reached} at best"))


def _alone(work: Callable[[], object]) -> None:
    work()


def first_and_best(out: Path, best: dict[str, Any]) -> tuple[str, str]:
    """Return the validation before training, nothing where a later one surpassed it, and the best, as they are shown.

    best: see `Progress`; where it is empty, so are both.
    """
    if not (measure := best.get("measure")):
        return "", ""
    entries = {entry["step"]: entry for entry in read_metrics(out / "metrics.jsonl") if measure in entry}
    reached = held_out_text(entries.get(best["step"], {}) | {measure: best["value"]}, measure)
    before = entries.get(0)
    surpassed = before is None or MEASURES[measure] * (best["value"] - before[measure]) > 0
    return "" if surpassed else held_out_text(before, measure), reached
