"""Runs side by side: one table, one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.compared_run import ComparedRun
from eval.score_files import shown, table
from eval.scores import Score
from training.run.log import ROUNDING
from training.run.plots import PANELS, load_pyplot, plain
from training.validation import MEASURED_ON

COLUMNS = 3
AXES = {"tokens": "tokens", "step": "steps", "seconds": "seconds of training"}
# What the table tells of a run's end, with its form.
ENDS = {
    "step": ("steps", "{:,}"),
    "tokens": ("tokens", "{:,}"),
    "seconds": ("seconds of training", "{:,.0f}"),
    "tokens_per_second": ("tokens per second, at the end", "{:,.0f}"),
    "loss": ("loss", "{:.4f}"),
    "val_bits_per_byte": ("held-out bits per byte", "{:.4f}"),
    "val_accuracy": ("held-out accuracy", "{:.1%}"),
    "val_pass_1": ("held-out pass@1", "{:.1%}"),
    "val_preferred": ("held-out pairs preferred", "{:.1%}"),
    "val_margin": ("held-out reward margin", "{:.3f}"),
    "reward": ("reward", "{:.3f}"),
    "kl": ("KL", "{:.4f}"),
    "max_vio_worst": ("MaxVio, worst layer", "{:.2f}"),
}
NONE = "–"


def markdown(runs: Sequence[ComparedRun]) -> str:
    """What each run came to, then the scores that any of them has. What is held out has a row for each set."""
    names = [run.name for run in runs]
    lines = ["# Comparison", ""]
    if any(run.entries for run in runs):
        rows = [["stage", *(run.stage if run.entries else NONE for run in runs)]]
        for key, (label, form) in ENDS.items():
            values = [run.last(key) for run in runs]
            for held_out, measured in _by_set(key, runs).items():
                cells = [NONE if run not in measured else form.format(values[n]) for n, run in enumerate(runs)]
                rows.append([label + held_out, *cells])
        lines += [*table(rows, ["at the end of training", *names]), ""]
        if len({run.stage for run in runs if run.entries}) > 1:
            lines += ["The losses are of different stages: they are not of one unit.", ""]
    rows, notes = _score_rows(runs)
    if rows:
        lines += [*table(rows, ["suite", "group", "metric", "chance", *names]), ""]
        lines += [
            "In brackets: the 95% interval. *: the intervals of the first run and of this one have nothing in common.",
            "",
        ]
    if any(row[2] == "perplexity" for row in rows):
        notes.append("Perplexity is a token's: it compares models of one tokenizer only. Bits per byte compare any.\n")
    return "\n".join([*lines, *notes])


def _by_set(key: str, runs: Sequence[ComparedRun]) -> dict[str, list[ComparedRun]]:
    """The runs that have a measure, by what follows its name: of what is held out, which data it was measured on."""
    found: dict[str, list[ComparedRun]] = {}
    for run in runs:
        if run.last(key) is not None:
            name, kind = (run.held_out(key), MEASURED_ON[key]) if key in MEASURED_ON else ("", "")
            title = f": {name}" if name else f" (not known to be the same {kind})" if kind else ""
            found.setdefault(title, []).append(run)
    return found


def _score_rows(runs: Sequence[ComparedRun]) -> tuple[list[list[str]], list[str]]:
    found = [_scores(run, runs) for run in runs]
    notes, rows = [], []
    for suite in dict.fromkeys(suite for run in runs for suite in run.suites):
        measured = [run.suites[suite] for run in runs if suite in run.suites]
        if not all(_same(measured[0], one) for one in measured):
            notes.append(f"{suite}: settings or items differ between the runs; its numbers are not to be compared.\n")
        elif len(measured) > 1 and not all(one.get("content") for one in measured):
            notes.append(f"{suite}: not known to be the same items, which older scores do not name.\n")
    for key in dict.fromkeys(key for scores in found for key in scores):
        scores = [own.get(key) for own in found]
        chance = next((shown(score.chance, score) for score in scores if score and score.chance is not None), "")
        rows.append([*key, chance, *(_cell(score, scores[0]) for score in scores)])
    return rows, notes


Key = tuple[str, str, str]
"""Suite, group and metric."""


def _scores(run: ComparedRun, runs: Sequence[ComparedRun]) -> dict[Key, Score]:
    """The scores of a run; a suite that differs from that of the runs before it has a number: `exam [2]`."""
    labels = {}
    for suite, measured in run.suites.items():
        different: list[dict[str, Any]] = []
        for other in (other.suites[suite] for other in runs if suite in other.suites):
            if not any(_same(one, other) for one in different):
                different.append(other)
        place = next(place for place, one in enumerate(different, 1) if _same(one, measured))
        labels[suite] = suite if place == 1 else f"{suite} [{place}]"
    return {(labels[suite], group, metric): score for (suite, group, metric), score in run.scores()}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two measurements of a suite are of the same items in the same way, as far as is known."""
    told = bool(one.get("content") and other.get("content"))
    aside = {"chunk", "data"} if told else {"chunk"}  # the same items may lie elsewhere
    ways = [{name: value for name, value in a["settings"].items() if name not in aside} for a in (one, other)]
    return ways[0] == ways[1] and one["items"] == other["items"] and (not told or one["content"] == other["content"])


def _cell(score: Score | None, first: Score | None) -> str:
    if score is None:
        return NONE
    if score.low is None:
        return shown(score.value, score)
    text = f"{shown(score.value, score)} ({shown(score.low, score)} to {shown(score.high, score)})"
    apart = first is not None and first.low is not None and (score.low > first.high or score.high < first.low)
    return f"{text} *" if apart else text


def draw(runs: Sequence[ComparedRun], path: Path, x: str) -> None:
    """A panel for each measure that a run logged, with a line for each run, and bars for the scores."""
    pyplot = load_pyplot()
    panels = [panel for title, unit, keys in PANELS for panel in _panels(title, unit, keys, runs)]
    # Shares, and bits per byte; other units have no common scale.
    bars: dict[bool, dict[Key, dict[str, Score]]] = {True: {}, False: {}}
    for run in runs:
        for key, score in _scores(run, runs).items():
            if key[1] == "all" and (score.share or score.metric == "bits_per_byte"):
                bars[score.share].setdefault(key, {})[run.name] = score
    count = len(panels) + len([found for found in bars.values() if found])
    columns = max(min(COLUMNS, count), 1)
    rows = max(-(-count // columns), 1)
    figure, axes = pyplot.subplots(rows, columns, figsize=(16, 4.2 * rows), layout="constrained", squeeze=False)
    colours = {run.name: f"C{number}" for number, run in enumerate(runs)}
    places = iter(axes.flat)
    for title, unit, lines in panels:
        _curves(next(places), title, unit, lines, colours, x)
    titles = {True: ("scores (black: 95%, red: chance)", "share"), False: ("texts", "bits per byte")}
    for is_share, found in bars.items():
        if found:
            _draw_bars(next(places), *titles[is_share], found, colours)
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
    """The panel, or one for each stage of losses and each set of held-out data, which have no common scale."""
    of_losses, parts = "loss" in keys, {}
    for run, key, label in ((run, *item) for run in runs for item in keys.items()):
        if _is_told(run, key):
            (name,) = [f": {run.stage}"] if of_losses else _by_set(key, [run])
            parts.setdefault(name, []).append((run, key, label))
    named = [name for name in parts if name]
    if len(named) < 2:
        lines = [line for part in parts.values() for line in part]
        return [(title + ("" if of_losses else "".join(named)), unit, lines)] if lines else []
    units = {name: "loss" if of_losses and name != ": next token" else unit for name in parts}
    return [(title + name, units[name], part) for name, part in parts.items()]


def _is_told(run: ComparedRun, key: str) -> bool:
    return any(entry.get(key) is not None and abs(entry[key]) > ROUNDING for entry in run.entries if entry["step"] > 0)


def _curves(axis: Any, title: str, unit: str, lines: list[Line], colours: dict[str, str], x: str) -> None:
    from matplotlib.ticker import EngFormatter

    styles = dict(zip(dict.fromkeys(key for _, key, _ in lines), ("-", "--", ":"), strict=False))
    for run, key, label in lines:
        told = [entry for entry in run.entries if entry["step"] > 0 and entry.get(x) is not None]
        points = [(entry[x], entry[key]) for entry in told if entry.get(key) is not None]
        if not points:
            continue
        marker = "o" if len(points) == 1 else ""  # a line of one point would not be seen
        axis.plot(*zip(*points, strict=True), styles[key] + marker, color=colours[run.name], linewidth=1.2, label=label)
    axis.set(title=plain(title), xlabel=AXES[x], ylabel=unit)
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axis.grid(alpha=0.3)
    if len(styles) > 1:
        from matplotlib.lines import Line2D

        names = {key: label for _, key, label in lines}
        axis.legend(handles=[Line2D([], [], color="grey", linestyle=styles[key], label=names[key]) for key in styles])


def _draw_bars(axis: Any, title: str, unit: str, bars: dict, colours: dict[str, str]) -> None:
    height, most = 0.8 / len(colours), 14
    keys = list(bars)[:most]
    for place, key in enumerate(keys):
        for number, (name, colour) in enumerate(colours.items()):
            score = bars[key].get(name)
            if score is None:
                continue
            at = place - 0.4 + height * (number + 0.5)
            axis.barh(at, score.value, height=height, color=colour)
            if score.low is not None:
                axis.plot([score.low, score.high], [at, at], color="black", linewidth=1)
            if score.chance is not None:
                axis.plot([score.chance] * 2, [place - 0.4, place + 0.4], color="red", linewidth=1.5)
    labels = [plain(" ".join(part for part in key if part not in ("all", "bits_per_byte"))) for key in keys]
    axis.set_yticks(range(len(keys)), labels, fontsize=8)
    axis.invert_yaxis()
    left_out = f"; {len(bars) - most} more in the table" if len(bars) > most else ""
    axis.set(title=title + left_out, xlabel=unit)
    axis.grid(axis="x", alpha=0.3)
