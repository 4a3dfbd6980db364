"""The lines that a run prints of its steps and validations, and what stands in them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from errors import WIDTH

ROUNDING = 1e-7  # the surrogate of GRPO's first inner step is 0 but for this, and says nothing
LEGEND = (
    "a line of training: means over the steps since the line before; of its own step are norm, lr and MaxVio\n"
    "(OUT/metrics.jsonl has the own values of each logged step):"
)


class Column(NamedTuple):
    """A measure by its name in metrics.jsonl: how it is shown, and what it means."""

    name: str
    form: str
    meaning: str


# The most telling first: what does not fit into a line is in metrics.jsonl.
COLUMNS = tuple(Column(*row) for row in (
    ("reward", "reward {:.3f}", "mean over the completions"),
    ("reward_correct", "correct {:.1%}", "completions whose answer is right"),
    ("zero_variance", "zero-variance {:.0%}", "groups whose completions all have one reward: they teach nothing"),
    ("completion_length", "length {:.0f}", "tokens of a completion, on average"),
    ("clip_share", "clipped {:.1%}", "tokens whose probability ratio left the clip range"),
    ("accuracy", "preferred {:.1%}", "pairs whose chosen answer the model prefers"),
    ("margin", "reward margin {:.3f}", "how much it prefers them"),
    ("kl", "kl {:.4f}", "distance to the reference model, or to the teacher, in nats per token"),
    ("loss", "loss {:.4f}", "nats of a token (DPO: of a pair), without MTP and balance"),
    ("divergence", "divergence {:.4f}", "from the teacher, in nats per token"),
    ("cross_entropy", "cross entropy {:.4f}", "with the labels, in nats per token"),
    ("grad_norm", "norm {:.2f}", "of the gradient before clipping; far above the usual is a bad step"),
    ("lr", "lr {:.1e}", "learning rate"),
    ("tokens_per_second", "{:,.0f} tok/s", "tokens per second, all ranks together"),
    ("max_vio_worst", "MaxVio {:.2f}", "load of the busiest expert over the mean, minus 1, in the worst layer"),
    ("memory_gb", "{:.1f} GB", "most memory so far, of the GPU or of this process"),
    ("mfu", "mfu {:.0%}", "share of the measured matrix-product peak that training reaches"),
    ("mtp_loss", "mtp {:.3f}", "loss of multi-token prediction, in nats per token"),
    ("entropy", "entropy {:.2f}", "of the sampled distributions, in nats; near 0 the samples are all alike"),
))  # fmt: skip
HELD_OUT = tuple(Column(*row) for row in (
    ("val_bits_per_byte", "{:.4f} bits/byte", "held-out loss per byte of text: comparable between tokenizers"),
    ("val_loss", "loss {:.4f} nats", "held-out loss of a token (DPO: of a pair)"),
    ("val_accuracy", "accuracy {:.1%}", "held-out problems that come out right"),
    ("val_preferred", "preferred {:.1%}", "held-out pairs whose chosen answer the model prefers"),
    ("val_pass_1", "pass@1 {:.1%}", "the same of sampled answers"),
    ("val_margin", "reward margin {:.3f}", "as above, on held-out pairs"),
))  # fmt: skip


def shown(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entry with the measures that are shown: of MaxVio the worst layer's; of pairs no `val_accuracy`.

    By that name reinforcement learning logs problems solved, and preference learning the share of held-out pairs that
    is preferred: `val_preferred`.
    """
    entry = dict(entry)
    if entry.get("max_vio"):
        entry["max_vio_worst"] = max(entry["max_vio"])
    if "val_margin" in entry and "val_accuracy" in entry:
        entry["val_preferred"] = entry.pop("val_accuracy")
    return entry


def held_out_text(entry: dict[str, Any], measure: str) -> str:
    """Return a measure of a validation as the line of its step shows it."""
    renamed = shown(entry)
    name = measure if measure in renamed else "val_preferred"
    return next(column.form for column in HELD_OUT if column.name == name).format(renamed[name])


def step_line(metrics: dict[str, Any], means: dict[str, float], share: float, left: float | None) -> str:
    """Return the line of a logged step.

    Args:
        metrics: its entry. means: since the line before, of measures that are shown in the place of the step's own.
        share: of the budget that is spent; left: seconds until the run's end, or None where nobody knows.
    """
    values = {**shown(metrics), **means}
    if abs(values.get("loss") or 0) < ROUNDING:
        values["loss"] = None
    if metrics.get("memory"):
        values["memory_gb"] = metrics["memory"] / 1e9
    parts = [f"step {metrics['step']:>6}", f"{share:>4.0%}"]
    if left is not None and share < 1:
        parts.append(f"{duration(left)} left")
    return _fitted(parts, COLUMNS, values)


def held_out_line(metrics: dict[str, Any], label: str = "val") -> str:
    """Return the line of a validation; empty where an entry has none."""
    if all(metrics.get(column.name) is None for column in HELD_OUT):
        return ""
    return _fitted([f"step {metrics['step']:>6}", f" {label}"], HELD_OUT, metrics)


def _fitted(parts: list[str], columns: Iterable[Column], values: dict[str, Any]) -> str:
    line = "  ".join(parts)
    for column in columns:
        value = values.get(column.name)
        said = value is not None and math.isfinite(value)
        if said and len(longer := f"{line}  {column.form.format(value)}") <= WIDTH:
            line = longer
    return line


def duration(seconds: float) -> str:
    """Write it with two units at most: 0.45s, 5.2s, 45s, 12m05s, 3h12m, 4d03h."""
    if seconds < 59.5:
        return f"{seconds:.2g}s" if seconds < 9.95 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def counted(number: int, noun: str) -> str:
    """Write 1 step, 2 steps, 16,000 steps."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def legend() -> str:
    """Explain what stands in these lines, for `--help`."""
    left = "at the pace of this run so far, validations among it"
    rows = [("4%", "share of the budget that is spent"), ("3h12m left", left)]
    rows += [(_label(column), column.meaning) for column in COLUMNS]
    rows += [("ema", "in the place of val: the same of the mean of the weights (--ema_decay)")]
    rows += [(f"val {_label(column)}", column.meaning) for column in HELD_OUT]
    lines = [f"  {name:<14} {meaning}" for name, meaning in rows]
    return "\n".join([LEGEND, *lines])


def _label(column: Column) -> str:
    """`norm` for "norm {:.2f}", `tok/s` for "{:,.0f} tok/s"."""
    before, _, after = column.form.partition("{")
    return f"{before.strip()} {after.partition('}')[2].strip('% ')}".strip()
