"""Runs side by side: one table, one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from textwrap import fill
from typing import Any, BinaryIO

from eval.compared_run import ComparedRun
from eval.score_files import draw_bars, shown, table
from eval.scores import WHOLE, Score
from training.run.lines import ROUNDING
from training.run.plots import PANELS, from_zero, load_pyplot, plain
from training.validation import MEASURED_ON

COLUMNS, MOST_BARS = 3, 14
TITLE = "scores (black: 95%, red: chance)"
AXES = {"tokens": "tokens", "step": "steps", "seconds": "seconds of training"}
# What the table shows of a run's end, with its format.
ENDS = {
    "step": ("steps", "{:,}"),
    "tokens": ("tokens", "{:,}"),
    "seconds": ("seconds of training", "{:,.0f}"),
    "tokens_per_second": ("tokens per second, at the end", "{:,.0f}"),
    "loss": ("loss of the last logged step", "{:.4f}"),
    "val_bits_per_byte": ("held-out bits per byte", "{:.4f}"),
    "val_accuracy": ("held-out accuracy", "{:.1%}"),
    "val_pass_1": ("held-out pass@1", "{:.1%}"),
    "val_preferred": ("held-out pairs preferred", "{:.1%}"),
    "val_margin": ("held-out reward margin", "{:.3f}"),
    "reward": ("reward of the last logged step", "{:.3f}"),
    "kl": ("KL of the last logged step", "{:.4f}"),
    "max_vio_worst": ("MaxVio of the last logged step, worst layer", "{:.2f}"),
}
NONE = "–"
Key = tuple[str, str, str]
"""Suite, group and metric."""


def markdown(runs: Sequence[ComparedRun]) -> str:
    """Return what each run came to, then the scores that any of them has. What is held out has a row for each set."""
    lines = ["# Comparison", ""]
    for header, rows, notes in tables(runs):
        lines += [*table(rows, header), "", *(line for note in notes for line in (note, ""))]
    return "\n".join(lines)


def tables(runs: Sequence[ComparedRun]) -> list[tuple[list[str], list[list[str]], list[str]]]:
    """Return header, rows and notes of what each run came to, and of the scores; neither where there are none."""
    names, found = [run.name for run in runs], []
    if any(run.entries for run in runs):
        rows = [["stage", *(run.stage if run.entries else NONE for run in runs)]]
        for key, (label, form) in ENDS.items():
            values = [run.last(key) for run in runs]
            for held_out, measured in _by_set(key, runs).items():
                cells = [NONE if run not in measured else form.format(values[n]) for n, run in enumerate(runs)]
                rows.append([label + held_out, *cells])
        several = len({run.stage for run in runs if run.entries}) > 1
        notes = ["The losses are of different stages: they are not of one unit."] if several else []
        found.append((["at the end of training", *names], rows, notes))
    rows, differing = _score_rows(runs)
    if rows:
        notes = ["In brackets: the 95% interval. *: the intervals of the first run and of this one do not overlap."]
        notes += differing
        if any(row[2] == "perplexity" for row in rows):
            notes.append("Perplexity is a token's: it compares models of one tokenizer. Bits per byte compare any.")
        found.append((["suite", "group", "metric", "chance", *names], rows, notes))
    return found


def _by_set(key: str, runs: Sequence[ComparedRun]) -> dict[str, list[ComparedRun]]:
    """Return the runs that have a measure, by what follows its name: the data if it is of held-out data."""
    found: dict[str, list[ComparedRun]] = {}
    for run in runs:
        if run.last(key) is not None:
            name, kind = (run.held_out(key), MEASURED_ON[key]) if key in MEASURED_ON else ("", "")
            title = f": {name}" if name else f" (not known to be the same {kind})" if kind else ""
            found.setdefault(title, []).append(run)
    return found


def _score_rows(runs: Sequence[ComparedRun]) -> tuple[list[list[str]], list[str]]:
    found, notes, rows = labelled_scores(runs), [], []
    for suite in dict.fromkeys(suite for run in runs for suite in run.suites):
        if len({_identity(run.suites[suite]) for run in runs if suite in run.suites}) > 1:
            notes.append(f"{suite}: settings or items differ between the runs; its numbers are not to be compared.")
    for key in dict.fromkeys(key for scores in found for key in scores):
        scores = [own.get(key) for own in found]
        chance = next((shown(score.chance, score) for score in scores if score and score.chance is not None), "")
        rows.append([*key, chance, *(_cell(score, scores[0]) for score in scores)])
    return rows, notes


def labelled_scores(runs: Sequence[ComparedRun]) -> list[dict[Key, Score]]:
    """Return the scores of each run; a suite that differs from one before it has a number: `exam [2]`."""
    different: dict[str, list[str]] = {}
    found: list[dict[Key, Score]] = []
    for run in runs:
        found.append({})
        for suite, measured in run.suites.items():
            known, identity = different.setdefault(suite, []), _identity(measured)
            known += [] if identity in known else [identity]
            place = known.index(identity) + 1
            label = suite if place == 1 else f"{suite} [{place}]"
            for score in (Score(**score) for score in measured["scores"]):
                if score.group in WHOLE:
                    found[-1][label, score.group, score.metric] = score
    return found


def _identity(measured: dict[str, Any]) -> str:
    """Return what two measurements have in common if they are of the same items in the same way, wherever these lie."""
    content = measured.get("content")  # which older scores do not have
    settings = {name: value for name, value in measured["settings"].items() if name != "data" or not content}
    return json.dumps([settings, measured["items"], content], sort_keys=True)


def _cell(score: Score | None, first: Score | None) -> str:
    if score is None:
        return NONE
    if score.low is None:
        return shown(score.value, score)
    text = f"{shown(score.value, score)} ({shown(score.low, score)} to {shown(score.high, score)})"
    apart = first is not None and first.low is not None and (score.low > first.high or score.high < first.low)
    return f"{text} *" if apart else text


def draw(runs: Sequence[ComparedRun], path: Path | BinaryIO, x: str = "tokens") -> None:
    """Draw a panel for each measure that a run logged, with a line for each run, and bars for the scores."""
    pyplot = load_pyplot()
    panels = [panel for title, unit, keys in PANELS for panel in _panels(title, unit, keys, runs)]
    # Shares, and bits per byte; other units have no common scale.
    bars: dict[bool, dict[str, dict[str, Score]]] = {True: {}, False: {}}
    for run, scores in zip(runs, labelled_scores(runs), strict=True):
        for (suite, group, metric), score in scores.items():
            if group == "all" and (score.share or metric == "bits_per_byte"):
                label = f"{suite} {metric}" if score.share else suite
                bars[score.share].setdefault(label, {})[run.name] = score
    count = max(len(panels) + sum(map(bool, bars.values())), 1)
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(16, 4.2 * rows), layout="constrained", squeeze=False)
    colours = {run.name: f"C{number}" for number, run in enumerate(runs)}
    places = iter(axes.flat)
    for title, unit, lines in panels:
        _curves(next(places), title, unit, lines, colours, x)
    for found, title, unit in ((bars[True], TITLE, "share"), (bars[False], "texts", "bits per byte")):
        if found:
            axis, left_out = next(places), max(len(found) - MOST_BARS, 0)
            draw_bars(axis, dict(islice(found.items(), MOST_BARS)), colours)
            axis.set(title=title + (f"; {left_out} more in the table" if left_out else ""), xlabel=unit)
    for unused in places:
        unused.set_axis_off()
    handles = [pyplot.Line2D([], [], color=colour, linewidth=4, label=plain(name)) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 4))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


Line = tuple[ComparedRun, str, str]
"""A run, a key of its entries, and what the key is called."""


def _panels(
    title: str, unit: str, keys: dict[str, str], runs: Sequence[ComparedRun]
) -> list[tuple[str, str, list[Line]]]:
    """Return the panel, or one for each stage of losses and set of held-out data, which have no common scale."""
    of_losses, parts = "loss" in keys, {}
    for run in runs:
        for key, label in keys.items():
            if any(entry.get(key) is not None and abs(entry[key]) > ROUNDING for entry in run.trained):
                (name,) = [f": {run.stage}"] if of_losses else _by_set(key, [run])
                parts.setdefault(name, []).append((run, key, label))
    named = [name for name in parts if name]
    if len(named) < 2:
        lines = [line for part in parts.values() for line in part]
        return [(title + ("" if of_losses else "".join(named)), unit, lines)] if lines else []
    units = {name: "loss" if of_losses and name != ": next token" else unit for name in parts}
    return [(title + name, units[name], part) for name, part in parts.items()]


def _curves(axis: Any, title: str, unit: str, lines: list[Line], colours: dict[str, str], x: str) -> None:
    from matplotlib.lines import Line2D

    names = {key: label for _, key, label in lines}
    styles = dict(zip(names, ("-", "--", ":"), strict=False))
    for run, key, label in lines:
        reported = [entry for entry in run.trained if entry.get(x) is not None and entry.get(key) is not None]
        if reported:
            marker = "o" if len(reported) == 1 else ""  # a line of one point would not be seen
            points = [entry[x] for entry in reported], [entry[key] for entry in reported]
            axis.plot(*points, styles[key] + marker, color=colours[run.name], linewidth=1.2, label=label)
    axis.set(title=fill(plain(title), 48), xlabel=AXES[x], ylabel=unit)
    from_zero(axis, max((entry.get(x) or 0 for run, _, _ in lines for entry in run.trained), default=0))
    axis.grid(alpha=0.3)
    if len(styles) > 1:
        axis.legend(handles=[Line2D([], [], color="grey", linestyle=styles[key], label=names[key]) for key in styles])
