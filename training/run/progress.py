"""How far a run is, what it may not change midway, and the checkpoints in its folder."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from errors import DamagedCheckpoint
from text.tokenizer import Tokenizer
from training.settings import StageSettings

PROGRESS_FILE = "training/progress.json"
STEP = re.compile(r"step-(\d+)$")
BEST = "best"
# A stage is judged by the first of these that its validation has; 1 where more is better, -1 where less is.
MEASURES = {"val_accuracy": 1, "val_bits_per_byte": -1, "val_loss": -1}

Resume = bool | Literal["last-good"]


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done; tokens: positions seen, counted or not, or those of completions that were trained
            on; seconds: of training, over all sittings.
        samples: those of all steps done, where steps are of several sizes; else 0, and not written down.
        finished: the budget is spent. run: settings that must not change between sittings.
        skipped: steps among `step` that were left out, since their loss or gradient was not finite.
        best: measure, value and step of the best validation; stale: how many have come since.
        late: the log's entry of `step`, where a signal came before the validation that was due: it is logged with it.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    finished: bool = False
    run: dict[str, object] = field(default_factory=dict)
    skipped: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    stale: int = 0
    late: dict[str, Any] = field(default_factory=dict)
    samples: int = 0

    def __post_init__(self) -> None:
        """Raises `ValueError` for what no run ever wrote: progress.json may be damaged."""
        counts = (self.step, self.skipped, self.stale, self.samples)
        numbers = (*counts, self.tokens, self.seconds, abs(self.best.get("value", 0)))
        fits = all(type(value) in (int, float) and 0 <= value < math.inf for value in numbers)
        fits = fits and all(type(value) is int for value in counts)
        fits = fits and isinstance(self.run, dict) and isinstance(self.late, dict)
        if not fits or self.best.keys() not in (set(), {"measure", "value", "step"}):
            raise ValueError("not the progress of a run")

    def judge(self, held_out: dict[str, Any]) -> bool:
        """Note a validation after `step`. Returns whether it is finite and better than all before."""
        name = next((name for name in MEASURES if name in held_out), None)
        value = float(held_out.get(name, math.nan))
        before = self.best.get("value") if self.best.get("measure") == name else None
        better = math.isfinite(value) and (before is None or MEASURES[name] * (value - before) > 0)
        if better:
            self.best = {"measure": name, "value": value, "step": self.step}
        self.stale = 0 if better else self.stale + 1
        return better


def read_progress(folder: Path) -> Progress:
    """Return how far the run was at this checkpoint. Raises `DamagedCheckpoint`, without a remedy."""
    path = folder / PROGRESS_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf8"))
        facts.pop("unmeasured", None)  # of checkpoints from before `late`
        return Progress(**facts)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error})") from None


def checkpoints(out: Path) -> list[Path]:
    """Return all checkpoints of a run, oldest first: its end is the newest, unless a larger budget took it further."""
    found, final = [path for path in out.glob("step-*") if STEP.match(path.name)], out / "final"
    return sorted([*found, final] if final.is_dir() else found, key=_step)


def newest(out: Path) -> Path | None:
    """Return `out`/final when the run is complete, else the last step checkpoint, else None."""
    found = checkpoints(out)
    return found[-1] if found else None


def holds_run(out: Path) -> bool:
    """Return whether something of a run is in the folder: a checkpoint, or one that made room for another."""
    return newest(out) is not None or any(path.is_dir() for path in (out / BEST, *out.glob(".*.before")))


def keep_last(out: Path, count: int) -> None:
    """Delete all but the last `count` step checkpoints."""
    for path in [path for path in checkpoints(out) if path.name != "final"][: -count or None]:
        shutil.rmtree(path, ignore_errors=True)


def give_back(folder: Path) -> None:
    """Return its name to the checkpoint that made room for another, which then never came: its save failed."""
    if before(folder).is_dir() and not folder.exists():
        os.replace(before(folder), folder)


def before(folder: Path) -> Path:
    """Return the name of a checkpoint that makes room for another of its name."""
    return folder.with_name(f".{folder.name}.before")


def saved_run(out: Path, resume: Resume) -> dict[str, Any]:
    """Return what a run that is to be resumed may not change; empty where no checkpoint of it can be read."""
    for folder in reversed(checkpoints(out)) if resume and out.is_dir() else ():
        with suppress(DamagedCheckpoint):
            return read_progress(folder).run
    return {}


def identity(settings: StageSettings, tokenizer: Tokenizer, dataset: object) -> dict[str, Any]:
    """Return what the data, their order and the optimiser's state depend on: a run cannot change it midway.

    `data.content` is for data sets whose `identity` does not tell their content; a run that lacks a key may resume.
    """
    run = {
        "seed": settings.seed,
        "sequence_length": settings.sequence_length,
        "rows": settings.rows,
        "tokenizer": tokenizer.fingerprint,
        "data": getattr(dataset, "identity", ""),
        "optim.kind": settings.optim.kind,
    }
    if settings.rows_by_share:
        run["rows"] = {str(share): rows for share, rows in settings.rows_by_share.items()}
    content = getattr(dataset, "content", "")
    return {**run, "data.content": content} if content else run


def _step(folder: Path) -> float:
    """Return how many steps a checkpoint has behind it; a `final` that does not tell stays the newest."""
    if match := STEP.match(folder.name):
        return int(match[1])
    try:
        return read_progress(folder).step
    except DamagedCheckpoint:
        return math.inf
