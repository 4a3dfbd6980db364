"""What a run tells: a progress bar, a line now and then, metrics.jsonl, and wandb when asked."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from errors import naming
from text.files import json_text
from training.held_out import is_named
from training.run.console import held_out_line, step_line

STRUCTURED = ("sample", "max_vio", "expert_load", "held_out")
QUIET = 30.0  # seconds after which the next step has a line, whatever --log_every says
LARGEST = 1e300  # beyond it pictures cannot be scaled


class RunLog:
    """Writes the metrics of one run folder; does nothing on other ranks.

    Args:
        out: the run folder; step: metrics of later steps are dropped, they are about to be made again.
        wandb: name of a wandb project, or empty. Without a key or a network it logs offline into the run folder.
    """

    def __init__(self, out: Path, step: int, active: bool, wandb: str, config: dict[str, Any]) -> None:
        self.active = active
        self.path = out / "metrics.jsonl"
        self.wandb = None
        if not active:
            return
        self._forget_after(step)
        self._losses: list[float] = []  # of the steps since the last line
        self._begin: tuple[float, float] | None = None  # share and seconds when this sitting began
        self._share, self._left, self._spoke = 0.0, None, time.monotonic()
        self.console = Console()
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), console=self.console, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task(out.name, total=1.0)
        if wandb:
            import wandb as library  # slow to import, and rarely wanted

            online = bool(os.environ.get("WANDB_API_KEY")) and os.environ.get("WANDB_MODE") != "offline"
            self.wandb = library.init(
                project=wandb, name=out.name, dir=str(out), config=config, mode="online" if online else "offline"
            )

    def __enter__(self) -> RunLog:
        if self.active:
            self.file = open(self.path, "a", encoding="utf8")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.bar.stop()
            with naming(self.path):
                self.file.close()
            if self.wandb is not None:
                self.wandb.finish()

    def begin(self, share: float, seconds: float) -> None:
        """Say how far the run is before the first step of this sitting; `seconds` of training it took."""
        self._begin = share, seconds
        self.stepped(share, seconds)

    def stepped(self, share: float, seconds: float, loss: float | None = None) -> None:
        """Take note of a step: `share` of the budget is spent after `seconds` of training."""
        if not self.active:
            return
        before, since = self._begin
        self._share = share
        self._left = (1 - share) * (seconds - since) / (share - before) if share > before else None
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)
        self.bar.update(self.task, completed=share)

    def doing(self, what: str) -> None:
        """Show beside the bar what the step, or a validation, is at; the name of the run when that is nothing."""
        if self.active:
            self.bar.update(self.task, description=what or self.path.parent.name)

    def pulse(self, step: int) -> None:
        """A line, but no entry of metrics.jsonl, of a step whose like have been silent for long."""
        if self.active and time.monotonic() - self._spoke > QUIET:
            self._print(self._line({"step": step}))

    def write(self, metrics: dict[str, Any]) -> None:
        """One object into metrics.jsonl, one line on the terminal."""
        if not self.active:
            return
        # JSON has no word for what is not finite.
        metrics = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        with naming(self.path):
            self.file.write(json_text(metrics) + "\n")
            self.file.flush()
        values = shown(metrics)
        if metrics["step"]:
            self._print(self._line(values))
        if line := held_out_line(values):
            self._print(line)
        if "sample" in metrics and "val_accuracy" in metrics:
            sample = metrics["sample"]
            worth = ", ".join(f"{name} {value:g}" for name, value in sample["rewards"].items())
            text = f"> {sample['question']}\n{sample['completion']}    (wanted {sample['answer']}; {worth})"
            self._print(text)
        if self.wandb is not None:
            flat = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
            layers = metrics.get("max_vio") or []
            flat.update({f"max_vio/layer_{index}": value for index, value in enumerate(layers)})
            self.wandb.log(flat, step=metrics["step"])

    def _line(self, metrics: dict[str, Any]) -> str:
        mean = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        return step_line(metrics, mean, self._share, self._left)

    def dim(self, text: str) -> None:
        """A line beside the numbers."""
        self._print(text, "dim")

    def _print(self, text: str, style: str | None = None) -> None:
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)
        self._spoke = time.monotonic()

    def take_back(self) -> dict[str, Any]:
        """Remove the last entry, to be written again with what it lacks. Call it before the log is entered."""
        entries = read_metrics(self.path) if self.active else []
        last = entries.pop() if entries else {}
        if self.active:
            self._rewrite(entries)
        return last

    def _forget_after(self, step: int) -> None:
        """Drop the lines that a resumed run writes again, and a line that a crash cut short."""
        self._rewrite([entry for entry in read_metrics(self.path) if entry["step"] <= step] if step else [])

    def _rewrite(self, entries: list[dict[str, Any]]) -> None:
        kept = [json_text(entry) for entry in entries]
        temporary = self.path.with_suffix(".partial")
        with naming(self.path):
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf8")
            os.replace(temporary, self.path)


def shown(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with the measures that people are shown: of MaxVio the worst layer's; of pairs no `val_accuracy`.

    By that name reinforcement learning logs problems solved, and preference learning the share of held-out pairs that
    is preferred: `val_preferred`.
    """
    entry = dict(entry)
    if entry.get("max_vio"):
        entry["max_vio_worst"] = max(entry["max_vio"])
    if "val_margin" in entry and "val_accuracy" in entry:
        entry["val_preferred"] = entry.pop("val_accuracy")
    return entry


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; a line that was cut short, or is no entry of a run, is left out."""
    entries = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and _is_entry(entry):
                entries.append(entry)
    return entries


def _is_entry(entry: dict[str, Any]) -> bool:
    """Whether a run may have written it: numbers, and four names with structure; others would not know what to do."""
    loads = entry.get("expert_load") or []
    return (
        type(entry.get("step")) is int
        and entry["step"] >= 0
        and all(value is None or _is_number(value) for name, value in entry.items() if name not in STRUCTURED)
        and _are_numbers(entry.get("max_vio") or [])
        and isinstance(loads, list)
        and all(load and _are_numbers(load) and len(load) == len(loads[0]) for load in loads)
        and isinstance(entry.get("sample", {}), dict)
        and is_named(entry.get("held_out", {}))
    )


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(map(_is_number, values))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and not abs(value) > LARGEST  # NaN is one
