"""A run's curves as one picture, from its metrics.jsonl."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from errors import DamagedCheckpoint
from training.run.lines import ROUNDING, counted, shown
from training.run.log import read_metrics
from training.run.progress import Progress, newest, read_progress

# Title, unit, and what of an entry is drawn under which name. A panel of which a run has nothing is left out.
PANELS = (
    ("training loss", "nats", {"loss": "loss", "mtp_loss": "MTP"}),
    ("held-out text", "bits per byte", {"val_bits_per_byte": "held out"}),
    ("pairs preferred", "share", {"accuracy": "train", "val_preferred": "held out"}),
    ("reward margin", "reward of chosen - rejected", {"margin": "train", "val_margin": "held out"}),
    ("rewards", "reward", {"reward": "train"}),
    ("problems solved", "share", {"val_accuracy": "held out, greedy", "val_pass_1": "held out, sampled"}),
    ("completions", "tokens", {"completion_length": "length"}),
    ("entropy and divergence", "nats a token", {"entropy": "entropy", "kl": "KL"}),
    ("distillation", "nats a label", {"divergence": "divergence from the teacher", "cross_entropy": "cross entropy"}),
    ("learning rate", "learning rate", {"lr": "learning rate"}),
    ("speed", "tokens per second", {"tokens_per_second": "training", "rollout_tokens_per_second": "sampling"}),
    ("expert balance", "MaxVio (0 is even)", {"max_vio_worst": "worst layer"}),
)
# Measured before the first step too; what is a matter of training begins at step 1.
FROM_THE_START = ("held-out text", "pairs preferred", "reward margin", "problems solved")
COLUMNS = 3
# Fonts with Chinese characters, which matplotlib's own has not: of Linux distributions, macOS and Windows.
CHINESE = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB",
    "Heiti TC", "STHeiti", "Microsoft YaHei", "SimHei", "SimSun", "Arial Unicode MS",
)  # fmt: skip


def draw_run(out: Path, file: BinaryIO | None = None) -> Path | None:
    """Draw losses, held-out measures, learning rate, speed, expert loads into `out`/curves.png, or into an open file.

    Returns the path; None without metrics.
    """
    pyplot = load_pyplot()
    entries = [shown(entry) for entry in read_metrics(out / "metrics.jsonl") if entry.get("tokens") is not None]
    if not entries:
        return None
    trained = [entry for entry in entries if entry["step"] > 0]
    drawn = [(title, unit, keys, entries if title in FROM_THE_START else trained) for title, unit, keys in PANELS]
    drawn = [panel for panel in drawn if any(_says(entry.get(key)) for entry in panel[3] for key in panel[2])]
    loads = [entry["expert_load"] for entry in entries if entry.get("expert_load")]
    rows = -(-(len(drawn) + bool(loads)) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(15, 4 * rows), layout="constrained", squeeze=False)
    steps, tokens = reached(out, entries[-1])
    figure.suptitle(plain(f"{out}: {counted(steps, 'step')}, {tokens:,} tokens"))
    places = iter(axes.flat)
    for title, unit, keys, points in drawn:
        _curve(next(places), points, keys, title, unit, tokens)
    if loads:
        _heat_map(figure, next(places), loads[-1])
    for unused in places:
        unused.set_axis_off()
    path = out / "curves.png"
    figure.savefig(file or path, dpi=100)
    pyplot.close(figure)
    return path


def drawn(out: Path) -> Path | None:
    """Return the picture of a run if it is as new as its metrics.jsonl."""
    picture, metrics = out / "curves.png", out / "metrics.jsonl"
    fresh = picture.is_file() and metrics.is_file() and picture.stat().st_mtime_ns >= metrics.stat().st_mtime_ns
    return picture if fresh else None


def reached(out: Path, last: dict[str, Any]) -> tuple[int, int]:
    """Return steps and tokens of a run: of its newest checkpoint, where that is beyond its last entry."""
    with suppress(DamagedCheckpoint):
        progress = read_progress(folder) if (folder := newest(out)) else Progress()
        if progress.step > last["step"]:
            return progress.step, progress.tokens
    return last["step"], last["tokens"]


def from_zero(axis: Any, last: float) -> None:
    """Have the horizontal axis go from 0 to the last point, in units such as 50 k, also where there is one point."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    last = max(last, 1)
    axis.set_xlim(-0.02 * last, 1.02 * last)
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))  # not 50000, of which six run into each other


def load_pyplot() -> ModuleType:
    """matplotlib's pyplot, slow to import, for pictures in files; with a Chinese font where the system has one."""
    import matplotlib
    from matplotlib import font_manager

    matplotlib.use("Agg")
    from matplotlib import pyplot

    there = {font.name for font in font_manager.fontManager.ttflist}
    chinese = [name for name in CHINESE if name in there][:1]
    matplotlib.rcParams["font.family"] = [*matplotlib.rcParamsOrig["font.family"], *chinese]
    return pyplot


def plain(text: str) -> str:
    """For a picture: without formulas, as what stands between two dollars would be, and with … for what no font has."""
    from matplotlib import font_manager, rcParams

    families = [font_manager.FontProperties(family=[name]) for name in rcParams["font.family"]]
    fonts = [font_manager.get_font(font_manager.findfont(family)) for family in families]
    shown = "".join(c if any(font.get_char_index(ord(c)) for font in fonts) else "\0" for c in text)
    return re.sub("\0+", "…", shown).replace("$", "\\$")


def _says(value: float | None) -> bool:
    """Return whether there is something to draw."""
    return value is not None and abs(value) > ROUNDING


def _curve(axis: Any, entries: list[dict[str, Any]], keys: dict[str, str], title: str, unit: str, tokens: int) -> None:
    for key, label in keys.items():
        points = [(entry["tokens"], entry[key]) for entry in entries if entry.get(key) is not None]
        if points:
            size = 2 if len(points) > 1 else 6
            axis.plot(*zip(*points, strict=True), "-o", label=label, linewidth=1.2, markersize=size)
    axis.set(title=title, xlabel="tokens", ylabel=unit)
    from_zero(axis, tokens)
    if title == "speed":
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()


def _heat_map(figure: Any, axis: Any, load: list[list[float]]) -> None:
    axis.set(title="expert load on held-out text", xlabel="expert", ylabel="MoE layer")
    relative = np.array(load) * len(load[0])
    image = axis.imshow(relative, aspect="auto", cmap="viridis", vmin=0, vmax=max(2.0, relative.max()))
    axis.set_yticks(range(len(load)), [str(layer + 1) for layer in range(len(load))])
    figure.colorbar(image, ax=axis, label="load / mean load (1 is even)")
