"""What a run tells: a progress bar, a line now and then, metrics.jsonl, and wandb when asked."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from errors import naming
from text.json_text import json_text
from training.held_out import is_named

COLUMNS = (
    ("reward", "reward {:.3f}"),
    ("loss", "loss {:.4f}"),
    ("mtp_loss", "mtp {:.3f}"),
    ("divergence", "divergence {:.4f}"),
    ("cross_entropy", "cross entropy {:.4f}"),
    ("accuracy", "preferred {:.1%}"),
    ("margin", "reward margin {:.3f}"),
    ("kl", "kl {:.4f}"),
    ("lr", "lr {:.2e}"),
    ("grad_norm", "norm {:.2f}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
    ("mfu", "mfu {:.1%}"),
    ("max_vio_worst", "MaxVio {:.2f}"),
    ("memory_gb", "{:.1f} GB"),
    ("completion_length", "length {:.0f}"),
    ("zero_variance", "same {:.0%}"),
    ("clip_share", "clipped {:.1%}"),
    ("entropy", "entropy {:.2f}"),
    ("val_accuracy", "held-out accuracy {:.1%}"),
    ("val_pass_1", "held-out pass@1 {:.1%}"),
    ("val_preferred", "held-out preferred {:.1%}"),
    ("val_margin", "held-out reward margin {:.3f}"),
    ("val_bits_per_byte", "val {:.4f} bits/byte"),
)

STRUCTURED = ("sample", "max_vio", "expert_load", "held_out")
LARGEST = 1e300  # beyond it pictures cannot be scaled
ROUNDING = 1e-7  # the surrogate of GRPO's first inner step is 0 but for this, and says nothing


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

    def progress(self, share: float) -> None:
        """Move the bar to `share` of the budget."""
        if self.active:
            self.bar.update(self.task, completed=share)

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
        if abs(1.0 if metrics.get("loss") is None else metrics["loss"]) < ROUNDING:
            del values["loss"]
        if metrics.get("memory"):
            values["memory_gb"] = metrics["memory"] / 1e9
        line = [form.format(values[name]) for name, form in COLUMNS if values.get(name) is not None]
        self.bar.console.print(f"step {metrics['step']:>6}  " + "  ".join(line), highlight=False, soft_wrap=True)
        if "sample" in metrics and "val_accuracy" in metrics:
            sample = metrics["sample"]
            worth = ", ".join(f"{name} {value:g}" for name, value in sample["rewards"].items())
            told = f"> {sample['question']}\n{sample['completion']}    (wanted {sample['answer']}; {worth})"
            self.bar.console.print(told, markup=False, highlight=False, soft_wrap=True)
        if self.wandb is not None:
            flat = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
            layers = metrics.get("max_vio") or []
            flat.update({f"max_vio/layer_{index}": value for index, value in enumerate(layers)})
            self.wandb.log(flat, step=metrics["step"])

    def _forget_after(self, step: int) -> None:
        """Drop the lines that a resumed run writes again, and a line that a crash cut short."""
        kept = [json_text(entry) for entry in read_metrics(self.path) if entry["step"] <= step] if step else []
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
