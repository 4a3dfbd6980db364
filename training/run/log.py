"""What a run reports: a progress bar, a short line now and then, metrics.jsonl, and to trackers when asked."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from errors import INDENT, QUIET, WIDTH, how_far, naming, one_line
from text.files import json_text, replacing
from training.run.lines import duration, held_out_line, shown, step_line

if TYPE_CHECKING:
    from training.run.trackers import Tracker
    from training.settings import StageSettings

STRUCTURED = ("sample", "max_vio", "expert_load", "held_out", "prompt", "text")  # not one number
LARGEST = 1e300  # beyond it pictures cannot be scaled
SHOWN, PROMPT, TEXT = 2, 32, 52  # samples; characters of a prompt's end, and of what follows it


class RunLog:
    """Writes the metrics of one run folder; does nothing on other ranks.

    Args:
        out: the run folder; step: metrics of later steps are dropped, they are about to be made again.
        trackers: where numbers and samples go besides; closed with the log.
    """

    def __init__(self, out: Path, step: int, active: bool, trackers: Sequence[Tracker] = ()) -> None:
        self.active, self.path, self.trackers = active, out / "metrics.jsonl", trackers
        if not active:
            return
        forget_after(self.path, step)
        self._measured: dict[str, list[float]] = {}  # by the steps since the last line
        self._share, self._left, self._told = 0.0, None, 0  # and the step whose line was the last
        self._spoke = self._stepped = time.monotonic()  # when the last line, and the last step, was
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TextColumn("{task.fields[left]}"), console=(console := Console()), transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task(out.name, total=1.0, left="")
        self.work = self.bar.add_task("", visible=False, left="")  # what a step, or a validation, is at

    def __enter__(self) -> RunLog:
        if self.active:
            self.file = open(self.path, "a", encoding="utf8")
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.bar.stop()
            with naming(self.path):
                self.file.close()
            for tracker in self.trackers:
                tracker.close()

    def stepped(self, share: float, left: float | None, measured: Mapping[str, float]) -> None:
        """Take note of a step and what it measured: `share` of the budget is spent, `left` are seconds if known."""
        if not self.active:
            return
        self._share, self._left, self._stepped = share, left, time.monotonic()
        for name, value in measured.items():
            if math.isfinite(value):
                self._measured.setdefault(name, []).append(value)
        self.bar.update(self.task, completed=share, left="" if left is None else f"{duration(left)} left")

    def doing(self, what: str, done: float, total: int) -> None:
        """Show, of what the step or a validation is at, how much is done: in a bar, or now and then in a line."""
        if not self.active:
            return
        task = self.bar.tasks[self.work]
        if what != task.description or total != task.total:
            self.bar.reset(self.work, description=what, total=total, visible=bool(what))
        self.bar.update(self.work, completed=done)
        silent = time.monotonic() - max(self._spoke, self._stepped)  # steps that take less are told of at their end
        if what and silent > QUIET and not self.bar.console.is_terminal:
            self.print(how_far(what, done, total))

    def pulse(self, step: int) -> None:
        """Print a line, but write no entry of metrics.jsonl, of a step whose like have been silent for long."""
        if self.active and time.monotonic() - self._spoke > QUIET:
            self.tell({"step": step})

    def write(self, metrics: dict[str, Any]) -> None:
        """Write one object into metrics.jsonl, and a line for the step, unless it was told, and for a validation."""
        if not self.active:
            return
        # JSON has no word for what is not finite.
        metrics = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        with naming(self.path):
            self.file.write(json_text(metrics) + "\n")
            self.file.flush()
        if metrics["step"] != self._told:
            self.tell(metrics)
        mean = {name.removeprefix("ema_"): value for name, value in metrics.items() if name.startswith("ema_")}
        for line in (held_out_line(shown(metrics)), held_out_line(shown({**metrics, **mean}), "ema") if mean else ""):
            if line:
                self.print(line)
        if self.trackers:
            numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
            numbers |= {f"max_vio/layer_{index}": value for index, value in enumerate(metrics.get("max_vio") or [])}
            for tracker in self.trackers:
                tracker.log(numbers, metrics["step"])
        if "sample" in metrics and "val_accuracy" in metrics:
            sample = metrics["sample"]
            worth = ", ".join(f"{name} {value:g}" for name, value in sample["rewards"].items())
            shown_of_it = sample["question"], sample["completion"], f"(wanted {sample['answer']}; {worth})"
            for label, text in zip(("sample     ", INDENT, INDENT), shown_of_it, strict=True):
                self.print(label + _middle_left_out(one_line(text), WIDTH - len(INDENT)), style="dim")
            for tracker in self.trackers:
                tracker.sample([{"prompt": sample["question"], "text": sample["completion"]}], metrics["step"])

    def sampled(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Print the first samples of the model's text, rows of prompt and text, and give all to the trackers."""
        for row in rows[:SHOWN]:
            prompt = one_line(row["prompt"])
            prompt = prompt if len(prompt) <= PROMPT else f"…{prompt[1 - PROMPT :]}"
            self.print(f"sample     {prompt} | {one_line(row['text'])[:TEXT]}", style="dim")
        for tracker in self.trackers if rows else ():
            tracker.sample(rows, step)

    def tell(self, metrics: dict[str, Any]) -> None:
        """Print the line of a step, which need not wait for its validation."""
        if not self.active:
            return
        self._told = metrics["step"]
        means = {name: sum(values) / len(values) for name, values in self._measured.items()}
        self._measured.clear()
        self.print(step_line(metrics, means, self._share, self._left))

    def print(self, text: str, style: str | None = None) -> None:
        """Print a line above the bar."""
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)
        self._spoke = time.monotonic()


def open_log(settings: StageSettings, step: int, main: bool) -> RunLog:
    """Return the log of a run from a step on, with the trackers that its settings name."""
    out, trackers = Path(settings.out), []
    if settings.trackers and main:
        opened = resolve_name("training.run.trackers:open_trackers")
        trackers = opened(settings.trackers, out, step, settings.wandb, asdict(settings))
    return RunLog(out, step, main, trackers)


def _middle_left_out(text: str, most: int) -> str:
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


def forget_after(path: Path, step: int) -> None:
    """Drop the entries that a resumed run writes again, and a line that a crash cut short."""
    kept = [json_text(entry) + "\n" for entry in read_metrics(path) if entry["step"] <= step] if step else []
    with naming(path), replacing(path) as file:
        file.write("".join(kept).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a metrics.jsonl; a line that was cut short, or is not an entry of a run, is left out."""
    entries = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, RecursionError, TypeError):
                entry = json.loads(line)
                if isinstance(entry, dict) and _is_entry(entry):
                    entries.append(entry)
    return entries


def _is_entry(entry: dict[str, Any]) -> bool:
    """Return whether a run may have written it: numbers, and names with structure that pictures rely on."""
    loads, held_out = entry.get("expert_load") or [], entry.get("held_out", {})
    return (
        type(entry.get("step")) is int
        and entry["step"] >= 0
        and all(value is None or _is_number(value) for name, value in entry.items() if name not in STRUCTURED)
        and isinstance(loads, list)
        and all(isinstance(row, list) and row and len(row) == len(loads[0]) for row in loads)
        and all(map(_is_number, [*(entry.get("max_vio") or []), *(value for row in loads for value in row)]))
        and isinstance(entry.get("sample", {}), dict)
        and isinstance(held_out, dict)
        and all(isinstance(name, str) for name in held_out.values())
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and not abs(value) > LARGEST  # NaN is one
