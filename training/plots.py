"""A run's curves as one picture, from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from training.log import read_metrics


def draw_run(out: Path) -> Path | None:
    """Draw `out`/curves.png: losses, bits per byte, learning rate, speed, expert loads. None without metrics."""
    import matplotlib  # slow to import, and wanted once a run

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = read_metrics(out / "metrics.jsonl")
    if not entries:
        return None
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    figure.suptitle(f"{out}: {entries[-1]['step']:,} steps, {entries[-1]['tokens']:,} tokens")
    trained = [entry for entry in entries if entry["step"] > 0]
    _curve(axes[0, 0], trained, {"loss": "loss", "mtp_loss": "MTP"}, "training loss", "nats")
    _curve(axes[0, 1], entries, {"val_bits_per_byte": "held out"}, "held-out text", "bits per byte", marker="o")
    _curve(axes[0, 2], trained, {"lr": "learning rate"}, "learning rate", "per step")
    _curve(axes[1, 0], trained, {"tokens_per_second": "speed"}, "speed", "tokens per second")
    axes[1, 0].set_ylim(bottom=0)
    worst = [{**entry, "worst": max(entry["max_vio"])} for entry in trained if entry.get("max_vio")]
    _curve(axes[1, 1], worst, {"worst": "worst layer"}, "expert balance", "MaxVio (0 is even)")
    loads = [entry["expert_load"] for entry in entries if entry.get("expert_load")]
    if any("margin" in entry for entry in trained):
        _curve(axes[1, 2], trained, {"accuracy": "preferred", "margin": "reward margin"}, "pairs", "share, reward")
    elif any("reward" in entry for entry in trained):
        names = {"reward": "reward", "val_accuracy": "held out, greedy", "val_pass_1": "held out, sampled"}
        _curve(axes[1, 2], entries, names, "rewards and held-out accuracy", "reward, share", marker="o")
    else:
        _heat_map(figure, axes[1, 2], loads[-1] if loads else None)
    path = out / "curves.png"
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def _curve(axis: Any, entries: list[dict[str, Any]], keys: dict[str, str], title: str, unit: str, **style: Any) -> None:
    for key, label in keys.items():
        points = [(entry["tokens"], entry[key]) for entry in entries if entry.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.2, markersize=3, **style)
    axis.set(title=title, xlabel="tokens", ylabel=unit)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()


def _heat_map(figure: Any, axis: Any, load: list[list[float]] | None) -> None:
    axis.set(title="expert load on held-out text", xlabel="expert", ylabel="MoE layer")
    if load is None:
        axis.text(0.5, 0.5, "no MoE layer or no validation", ha="center", transform=axis.transAxes)
        return
    relative = np.array(load) * len(load[0])
    image = axis.imshow(relative, aspect="auto", cmap="viridis", vmin=0, vmax=max(2.0, relative.max()))
    axis.set_yticks(range(len(load)), [str(layer + 1) for layer in range(len(load))])
    figure.colorbar(image, ax=axis, label="load / mean load (1 is even)")
