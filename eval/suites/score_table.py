"""Scores for people: a Markdown table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.suites.measuring import Measured
from eval.suites.suite import Score
from training.run.plots import load_pyplot, plain

HEADER = ("suite", "group", "metric", "value", "95% interval", "chance", "items")


def cells(name: str, score: Score) -> list[str]:
    """One line of the table: value, interval and chance side by side."""
    interval = "" if score.low is None else f"{shown(score.low, score)} to {shown(score.high, score)}"
    chance = "" if score.chance is None else shown(score.chance, score)
    return [name, score.group, score.metric, shown(score.value, score), interval, chance, str(score.items)]


def shown(value: float, score: Score) -> str:
    if score.share:
        return f"{value:.1%}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def markdown(model: str, measured: Sequence[Measured]) -> str:
    """The page of all suites; the whole of each first, then its groups."""
    lines = [f"# {model}", ""]
    lines += table([cells(one.name, score) for one in measured for score in one.scores if _is_whole(score)])
    for one in measured:
        groups = [score for score in one.scores if not _is_whole(score)]
        if groups:
            lines += ["", f"## {one.name}", "", *table([cells(one.name, score) for score in groups])]
    cut = [
        f"{one.name}: {one.cut} of {one.items} questions had no room in the context and lost their beginning"
        for one in measured
        if one.cut
    ]
    return "\n".join([*lines, "", *cut, *([""] if cut else [])])


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> list[str]:
    """Lines of Markdown; a | in a cell stays in it."""
    inside = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in inside]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def draw(model: str, measured: Sequence[Measured], path: Path) -> None:
    """Shares of each suite with their intervals and the chance level; other numbers have no common scale."""
    pyplot = load_pyplot()
    drawn = [(one.name, score) for one in measured for score in one.scores if score.share and _is_drawn(one, score)]
    if not drawn:
        path.unlink(missing_ok=True)
        return
    figure, axis = pyplot.subplots(figsize=(9, 1 + 0.32 * len(drawn)), layout="constrained")
    for place, (_, score) in enumerate(drawn):
        axis.barh(place, score.value, color="#4c72b0", height=0.6)
        if score.low is not None:
            axis.plot([score.low, score.high], [place, place], color="black", linewidth=1.2)
        if score.chance is not None:
            axis.plot([score.chance] * 2, [place - 0.4, place + 0.4], color="#c44e52", linewidth=2)
    labels = [plain(f"{name}  {score.group}  {score.metric}".replace("  all", "")) for name, score in drawn]
    axis.set_yticks(range(len(drawn)), labels)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="share (black: 95% interval, red: chance)", title=plain(model))
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _is_whole(score: Score) -> bool:
    return score.group in ("all", "mean of subjects")


def _is_drawn(one: Measured, score: Score) -> bool:
    """All groups where they are few, the whole where they are many."""
    return _is_whole(score) or len({other.group for other in one.scores}) <= 8
