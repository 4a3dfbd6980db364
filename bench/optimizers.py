"""Optimisers on one recipe: how long until held-out text costs a given number of bits per byte, over seeds.

    python bench/optimizers.py --data corpus.csv --tokenizer DIR --out out/optimizers [--kinds adamw muon] [--seeds 3]

Runs pretrain.py for each seed with each optimiser in turn, all else equal. The target is what the first one ends with,
its worst seed, unless --target gives one; time is that of training without validations. Runs that are complete in OUT
are read, not run again, and interrupted ones go on. Writes OUT/optimizers.json and OUT/optimizers.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from race import ROOT, environment, seconds_to

from errors import UserError, command_line
from training.run.log import read_metrics

KINDS = ("adamw", "adamw_bf16", "muon")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--config", default=str(ROOT / "configs" / "minutes.yaml"))
    parser.add_argument("--kinds", nargs="+", default=["adamw", "muon"], choices=KINDS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--val_every", type=int, default=25)
    parser.add_argument("--target", type=float, help="bits per byte; left out: the worst end of the first kind's runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--options", default="", help="further options of pretrain.py for all, in one string")
    for kind in KINDS:
        parser.add_argument(f"--{kind}_options", default="", help=f"further ones for {kind}")
    options = parser.parse_args()
    out = Path(options.out)
    curves: dict[str, list[list[dict[str, float]]]] = {kind: [] for kind in options.kinds}
    for seed in range(options.seeds):
        for kind in options.kinds:
            curves[kind].append(curve(kind, seed, out, options))
    target = options.target or max(points[-1]["bits_per_byte"] for points in curves[options.kinds[0]])
    summary = {kind: summarise(curves[kind], target) for kind in options.kinds}
    results = {"target": target, "summary": summary, "curves": curves}
    (out / "optimizers.json").write_text(json.dumps(results, ensure_ascii=False, indent=2), encoding="utf8")
    draw(curves, target, out / "optimizers.png")
    print(table(summary, target))


def curve(kind: str, seed: int, out: Path, options: argparse.Namespace) -> list[dict[str, float]]:
    """One run, from its beginning or where it was left. Returns its validations."""
    folder = out / f"{kind}-{seed}"
    given = {
        "config": options.config, "data": options.data, "tokenizer": options.tokenizer, "shards": out / "shards",
        "out": folder, "seed": seed, "threads": options.threads, "max_steps": options.steps, "max_minutes": 10**6,
        "val_every": options.val_every, "save_every": 0, "optim.kind": kind, "resume": "true",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "pretrain.py")]
    command += [part for key, value in given.items() for part in (f"--{key}", str(value))]
    command += [*options.options.split(), *getattr(options, f"{kind}_options").split()]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "final").is_dir():
        with open(folder / "log.txt", "a", encoding="utf8") as log:
            subprocess.run(command, env=environment(ROOT, options.threads), stdout=log, stderr=log)
    if not (folder / "final").is_dir():
        raise UserError(f"{folder}: did not come to its end; see {folder / 'log.txt'}, then run the same again")
    entries = [entry for entry in read_metrics(folder / "metrics.jsonl") if "val_bits_per_byte" in entry]
    return [
        {"step": entry["step"], "seconds": entry.get("seconds", 0.0), "bits_per_byte": entry["val_bits_per_byte"]}
        for entry in entries
    ]


def summarise(curves: list[list[dict[str, float]]], target: float) -> dict[str, Any]:
    """Of each seed: the end, the median seconds of a step, and when the target was reached (None: never)."""
    return {
        "end": [points[-1]["bits_per_byte"] for points in curves],
        "seconds a step": [statistics.median(_paces(points)) for points in curves],
        "seconds to target": [seconds_to(points, target) for points in curves],
        "steps to target": [
            seconds_to([{**point, "seconds": point["step"]} for point in points], target) for points in curves
        ],
    }


def _paces(points: list[dict[str, float]]) -> list[float]:
    """Seconds a step between one validation and the next."""
    return [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"]) for before, after in pairwise(points)
    ]


def table(summary: dict[str, Any], target: float) -> str:
    """Mean (all seeds) of each column; a seed that never reached the target is a dash and not in the mean."""
    lines = [f"target {target:.4f} bits per byte"]
    for kind, columns in summary.items():
        cells = []
        for name, values in columns.items():
            form = "{:.4f}" if name == "end" else "{:.3f}" if "a step" in name else "{:.0f}"
            reached = [value for value in values if value is not None]
            each = ", ".join("-" if value is None else form.format(value) for value in values)
            cells.append(f"{name} {form.format(statistics.mean(reached)) if reached else '-'} ({each})")
        lines.append(f"{kind:>10}  " + "  ".join(cells))
    return "\n".join(lines)


def draw(curves: dict[str, list[list[dict[str, float]]]], target: float, path: Path) -> None:
    """Bits per byte against steps and against minutes, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for axes, (key, unit, label) in zip(panels, (("step", 1, "steps"), ("seconds", 60, "minutes")), strict=True):
        for (kind, of_kind), colour in zip(curves.items(), ("C1", "C0", "C2"), strict=False):
            for seed, points in enumerate(of_kind):
                x, y = [p[key] / unit for p in points[1:]], [p["bits_per_byte"] for p in points[1:]]
                axes.plot(x, y, colour, alpha=0.8, label=None if seed else kind)
        axes.axhline(target, color="gray", linestyle=":", label=f"target {target:.3f}")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("bits per byte of held-out text")
    panels[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    command_line(main)
