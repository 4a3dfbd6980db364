"""The figures of the claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.compared_run import ComparedRun
from eval.curves import logged
from training.run.plots import load_pyplot, plain

SIZE = (6.4, 3.6)  # inches


def curves(path: Path, arms: Mapping[str, Sequence[ComparedRun]], measure: str, label: str) -> None:
    """Draw a measure over tokens: of each arm the mean over its seeds, and the band of two sigma."""
    pyplot = load_pyplot()
    from matplotlib.ticker import EngFormatter

    figure, axis = pyplot.subplots(figsize=SIZE, layout="constrained")
    for name, runs in arms.items():
        found = [logged(run, measure) for run in runs]
        shortest = min(map(len, found))
        lines = np.stack([curve[:shortest, 1] for curve in found])
        tokens, middle = found[0][:shortest, 0], lines.mean(0)
        (line,) = axis.plot(tokens, middle, label=plain(name))
        if len(lines) > 1:
            spread = 2 * lines.std(0, ddof=1)
            axis.fill_between(tokens, middle - spread, middle + spread, color=line.get_color(), alpha=0.2, lw=0)
    axis.set(xlabel="tokens", ylabel=label)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.legend(fontsize=8)
    _write(pyplot, figure, path)


def points(path: Path, arms: Mapping[str, Sequence[float]], label: str) -> None:
    """Draw a value of each seed of each arm, and the mean."""
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=SIZE, layout="constrained")
    for place, values in enumerate(arms.values()):
        axis.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5, ms=5)
        axis.plot([np.mean(values)], [place], "|", color="black", ms=16, mew=2)
    axis.set_yticks(range(len(arms)), [plain(name) for name in arms])
    axis.invert_yaxis()
    axis.set(xlabel=f"{label} (dots: seeds, bar: mean)")
    axis.grid(axis="x", alpha=0.3)
    _write(pyplot, figure, path)


def lines(path: Path, x: Sequence[float], arms: Mapping[str, Sequence[float]], labels: tuple[str, str]) -> None:
    """Draw values over x, both on logarithmic scales."""
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=SIZE, layout="constrained")
    for name, values in arms.items():
        axis.plot(x, values, "o-", label=plain(name))
    axis.set(xlabel=labels[0], ylabel=labels[1], xscale="log", yscale="log")
    axis.legend(fontsize=8)
    _write(pyplot, figure, path)


def loads(path: Path, arms: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw relative loads: a row of maps for each arm, a map for each MoE layer, domains over experts (Figure 9)."""
    pyplot = load_pyplot()
    layers = len(next(iter(next(iter(arms.values())).values())))
    figure, axes = pyplot.subplots(
        len(arms), layers, figsize=(3.2 * layers, 1.5 * len(arms)), squeeze=False, layout="constrained"
    )
    for row, (name, counts) in zip(axes, arms.items(), strict=True):
        for layer, axis in enumerate(row):
            values = np.stack([np.asarray(each[layer] / each[layer].mean()) for each in counts.values()])
            image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=4)
            axis.set_yticks(range(len(counts)), [plain(domain) if not layer else "" for domain in counts], fontsize=7)
            axis.set_title(f"{plain(name)}, MoE layer {layer + 1}", fontsize=8)
            axis.set_xlabel("expert", fontsize=7)
            axis.tick_params(labelsize=7)
    figure.colorbar(image, ax=axes, label="load over the mean", fraction=0.02)
    _write(pyplot, figure, path)


def _write(pyplot: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
