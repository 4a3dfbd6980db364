"""What a run shows of a logged step: a line of at most 100 characters, one for held-out data, and their legend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

WIDTH = 100
ROUNDING = 1e-7  # the surrogate of GRPO's first inner step is 0 but for this, and says nothing


class Column(NamedTuple):
    """A measure by its name in metrics.jsonl: how it is shown, and what it means."""

    name: str
    form: str
    meaning: str


# The most telling first: what does not fit into a line is in metrics.jsonl.
COLUMNS = (
    Column("reward", "reward {:.3f}", "mean over the completions of the step"),
    Column(
        "zero_variance",
        "zero-variance {:.0%}",
        "groups whose completions all have one reward: they have no advantage and teach nothing",
    ),
    Column("completion_length", "length {:.0f}", "tokens of a completion, on average"),
    Column("clip_share", "clipped {:.1%}", "tokens whose probability ratio left the clip range"),
    Column("accuracy", "preferred {:.1%}", "pairs whose chosen answer the model prefers"),
    Column("margin", "reward margin {:.3f}", "how much it prefers them"),
    Column("kl", "kl {:.4f}", "distance to the reference model, or to the teacher, in nats per token"),
    Column(
        "loss",
        "loss {:.4f}",
        "in nats of a token (DPO: of a pair), mean of the steps since the line before; without MTP and balance",
    ),
    Column("divergence", "divergence {:.4f}", "from the teacher, in nats per token"),
    Column("cross_entropy", "cross entropy {:.4f}", "with the labels, in nats per token"),
    Column("grad_norm", "norm {:.2f}", "of the gradient before clipping; far above the usual is a bad step"),
    Column("lr", "lr {:.1e}", "learning rate"),
    Column("tokens_per_second", "{:,.0f} tok/s", "tokens per second, all ranks together"),
    Column(
        "max_vio_worst",
        "MaxVio {:.2f}",
        "load of the busiest expert over the mean, minus 1, in the worst layer: 0 is perfect balance",
    ),
    Column("memory_gb", "{:.1f} GB", "most memory so far, of the GPU or of this process"),
    Column("mfu", "mfu {:.0%}", "share of the measured matrix-product peak that training reaches"),
    Column("mtp_loss", "mtp {:.3f}", "loss of multi-token prediction, in nats per token"),
    Column("entropy", "entropy {:.2f}", "of the sampled distributions, in nats; near 0 the samples are all alike"),
)
HELD_OUT = (
    Column("val_bits_per_byte", "{:.4f} bits/byte", "held-out loss per byte of text: comparable between tokenizers"),
    Column("val_loss", "loss {:.4f} nats", "held-out loss of a token (DPO: of a pair)"),
    Column("val_accuracy", "accuracy {:.1%}", "held-out problems that come out right"),
    Column("val_preferred", "preferred {:.1%}", "held-out pairs whose chosen answer the model prefers"),
    Column("val_pass_1", "pass@1 {:.1%}", "the same of sampled answers"),
    Column("val_margin", "reward margin {:.3f}", "as above, on held-out pairs"),
)


def step_line(metrics: dict[str, Any], loss: float | None, share: float, left: float | None) -> str:
    """The line of a logged step.

    Args:
        metrics: its entry. loss: mean since the line before, or None.
        share: of the budget that is spent; left: seconds until its end, or None where nobody knows.
    """
    values = {**metrics, "loss": loss}
    if metrics.get("max_vio"):
        values["max_vio_worst"] = max(metrics["max_vio"])
    if loss is not None and abs(loss) < ROUNDING:
        values["loss"] = None
    if metrics.get("memory"):
        values["memory_gb"] = metrics["memory"] / 1e9
    parts = [f"step {metrics['step']:>6}", f"{share:>4.0%}"]
    if left is not None and share < 1:
        parts.append(f"{duration(left)} left")
    return _fitted(parts, COLUMNS, values)


def held_out_line(metrics: dict[str, Any]) -> str:
    """The line of a validation; empty where an entry has none."""
    if all(metrics.get(column.name) is None for column in HELD_OUT):
        return ""
    return _fitted([f"step {metrics['step']:>6}", " val"], HELD_OUT, metrics)


def _fitted(parts: list[str], columns: Iterable[Column], values: dict[str, Any]) -> str:
    line = "  ".join(parts)
    for column in columns:
        value = values.get(column.name)
        if value is not None and len(longer := f"{line}  {column.form.format(value)}") <= WIDTH:
            line = longer
    return line


def duration(seconds: float) -> str:
    """Two units at most: 0.45s, 5.2s, 45s, 12m05s, 3h12m, 4d03h."""
    if seconds < 9.95:
        return f"{seconds:.2g}s"
    if seconds < 59.5:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def legend() -> str:
    """What stands in these lines, for `--help`."""
    rows = [("4%", "share of the budget that is spent"), ("3h12m left", "at the pace of this run so far")]
    rows += [(_label(column), column.meaning) for column in COLUMNS]
    rows += [(f"val {_label(column)}", column.meaning) for column in HELD_OUT]
    lines = [f"  {name:<14} {meaning}" for name, meaning in rows]
    return "\n".join(["a line of training (OUT/metrics.jsonl has each logged step's own values):", *lines])


def _label(column: Column) -> str:
    """`norm` for "norm {:.2f}", `tok/s` for "{:,.0f} tok/s"."""
    before, _, after = column.form.partition("{")
    return f"{before.strip()} {after.partition('}')[2].strip('% ')}".strip()
