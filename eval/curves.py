"""Reference curves: what a recipe's loss looks like over its seeds, as a CSV file and a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from errors import UserError, naming, require
from eval.compared_run import ComparedRun
from eval.run_recipe import differences, settings_of
from text.files import replacing

FOLDER = Path("docs/curves")
BINS = 40  # of the tokens, finer at the beginning, where the loss falls fast
NEIGHBOURS = 3  # bins to each side that share their variance: that of a few seeds alone is a guess
SIGMAS = 2.0
# What of a run is compared, with its unit; and what tells why, of which the median is compared.
MEASURES = {"loss": "nats a token", "val_bits_per_byte": "bits per byte"}
SIGNS = ("grad_norm", "max_vio_worst")


@dataclass(frozen=True)
class Point:
    """Of one measure at so many tokens: mean over the seeds, sigma between them, and that of a single logged step."""

    tokens: float
    mean: float
    sigma: float
    step: float


@dataclass(frozen=True)
class Curve:
    """A reference. facts: seeds, tokens at the end, tokenizer, held-out text, settings, medians of the signs."""

    name: str
    facts: dict[str, Any]
    points: dict[str, list[Point]]


def measure_band(name: str, runs: Sequence[ComparedRun]) -> Curve:
    """Return the curve of runs that differ in their seed alone. Raises `UserError` for others, and for a single one."""
    require(len(runs) > 1, "--band: two seeds or more make a band, three are better; name another run")
    settings = [settings_of(run) for run in runs]
    for run, own in zip(runs[1:], settings[1:], strict=True):
        if change := differences(own, settings[0]):
            raise UserError(f"--band: {run.folder} is not a further seed of {runs[0].folder}: {change[0]}")
    seeds = [own["seed"] for own in settings]
    require(len(set(seeds)) == len(seeds), f"--band: seeds {', '.join(map(str, seeds))}: two runs have the same")
    end = min(run.last("tokens") or 0 for run in runs)
    points = {}
    for measure in MEASURES:
        curves = [logged(run, measure) for run in runs]
        if all(len(curve) for curve in curves):
            points[measure] = _points(curves, end, binned=measure == "loss")
    require("loss" in points, "--band: the runs have logged no loss")
    require(all(own["tokens"] for own in settings), "--band: a run is not at its end; use --resume, then come back")
    facts = {"seeds": seeds, **{key: value for key, value in settings[0].items() if key != "seed"}}
    facts["signs"] = {key: round(float(np.median([median(run, key) for run in runs])), 4) for key in SIGNS}
    return Curve(name, facts, points)


def _points(curves: Sequence[np.ndarray], end: float, binned: bool) -> list[Point]:
    """Return mean and spread over the curves, which are (logged, 2) each: tokens and values.

    binned: by stretches of tokens; else, as validations are, at the tokens that all have.
    """
    found = []
    if binned:
        edges = end * (np.arange(BINS + 1) / BINS) ** 2
        cuts = [[curve[(low < curve[:, 0]) & (curve[:, 0] <= high)] for curve in curves]
                for low, high in pairwise(edges)]  # fmt: skip
    else:
        common = sorted(set.intersection(*({*curve[:, 0]} for curve in curves)))
        cuts = [[curve[curve[:, 0] == tokens] for curve in curves] for tokens in common]
    for parts in cuts:
        if all(len(part) for part in parts):
            means = [part[:, 1].mean() for part in parts]
            spread = [part[:, 1].var(ddof=1) for part in parts if len(part) > 2]
            tokens = np.mean([part[:, 0].mean() for part in parts])
            found.append((tokens, np.mean(means), np.var(means, ddof=1), np.mean(spread) if spread else 0.0))
    points = []
    for place, (tokens, mean, _, step) in enumerate(found):
        near = found[max(place - NEIGHBOURS, 0) : place + NEIGHBOURS + 1]
        sigma = math.sqrt(np.mean([variance for _, _, variance, _ in near]))
        points.append(Point(float(tokens), float(mean), sigma, math.sqrt(step)))
    return points


def logged(run: ComparedRun, measure: str) -> np.ndarray:
    """Return (logged, 2): tokens and finite values of a measure."""
    found = [(one["tokens"], one[measure]) for one in run.trained if math.isfinite(one.get(measure) or math.nan)]
    return np.array(found, dtype=float).reshape(-1, 2)


def median(run: ComparedRun, key: str) -> float:
    values = [one[key] for one in run.trained if one.get(key) is not None]
    return float(np.median(values)) if values else 0.0


def write_curve(curve: Curve, runs: Sequence[ComparedRun], folder: Path) -> list[Path]:
    """Write NAME.csv, with the facts in lines that begin with #, and NAME.png."""
    text = io.StringIO()
    for line in yaml.safe_dump(curve.facts, allow_unicode=True, sort_keys=False).splitlines():
        text.write(f"# {line}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["measure", "tokens", "mean", "sigma", "step_sigma"])
    for measure, points in curve.points.items():
        for point in points:
            writer.writerow(
                [measure, *(f"{value:.6g}" for value in (point.tokens, point.mean, point.sigma, point.step))]
            )
    files = [folder / f"{curve.name}.csv", folder / f"{curve.name}.png"]
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(files[0]) as stream:
            stream.write(text.getvalue().encode("utf8"))
    draw(
        curve,
        [replace(run, name=f"seed {seed}") for run, seed in zip(runs, curve.facts["seeds"], strict=True)],
        files[1],
    )
    return files


def read_curve(name: str, folder: Path = FOLDER) -> Curve:
    """Read a reference by its name, or a .csv file. Raises `UserError` for what is none."""
    file = Path(name) if name.endswith(".csv") else folder / f"{name}.csv"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.csv"))) or "none yet"
        raise UserError(f"--reference {name}: no such curve in {folder}; there are: {known}")
    try:
        lines = file.read_text(encoding="utf8").splitlines()
        facts = yaml.safe_load("\n".join(line[2:] for line in lines if line.startswith("#")))
        points: dict[str, list[Point]] = {}
        for row in csv.DictReader(line for line in lines if not line.startswith("#")):
            values = (float(row[key]) for key in ("tokens", "mean", "sigma", "step_sigma"))
            points.setdefault(row["measure"], []).append(Point(*values))
        if not points["loss"] or not {"seeds", "tokens", "tokenizer", "held_out", "settings", "signs"} <= {*facts}:
            raise ValueError("facts or points are missing")
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not a reference curve ({error}); write it again with --band") from None
    return Curve(file.stem, facts, points)


def draw(curve: Curve, runs: Sequence[ComparedRun], file: Path) -> None:
    """Draw mean and band of each measure, and the runs as lines."""
    from training.run.plots import from_zero, load_pyplot, plain

    pyplot = load_pyplot()
    count = len(curve.points)
    figure, axes = pyplot.subplots(1, count, figsize=(7 * count, 4.5), layout="constrained", squeeze=False)
    for axis, (measure, points) in zip(axes.flat, curve.points.items(), strict=True):
        tokens, mean, sigma = (
            np.array([getattr(point, key) for point in points]) for key in ("tokens", "mean", "sigma")
        )
        for run in runs:
            own = logged(run, measure)
            axis.plot(own[:, 0], own[:, 1], linewidth=0.6, alpha=0.7, label=plain(run.name))
        axis.plot(tokens, mean, color="black", linewidth=1.2, label="mean over the seeds")
        axis.fill_between(
            tokens, mean - SIGMAS * sigma, mean + SIGMAS * sigma, color="grey", alpha=0.4, label="2 sigma"
        )
        axis.set(title=plain(f"{curve.name}: {measure}"), xlabel="tokens", ylabel=MEASURES[measure])
        low = float((mean - SIGMAS * sigma).min())
        axis.set_ylim(low - 0.05 * (mean.max() - low), mean[0] + 0.05 * (mean.max() - low))
        from_zero(axis, tokens[-1])
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
