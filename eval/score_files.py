"""Scores on disk: scores.json, a Markdown page for people and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from errors import UserError, naming
from eval.scores import WHOLE, Measured, Score
from model.checkpoint.folder import CARD
from text.files import json_text, replacing
from training.run.plots import load_pyplot, plain

SCORES = "scores.json"
HEADER = ("suite", "group", "metric", "value", "95% interval", "chance", "items")


def is_of_run(folder: Path) -> bool:
    """Return whether this is a checkpoint folder in a run folder, such as OUT/final."""
    return folder.is_dir() and (folder.absolute().parent / "metrics.jsonl").is_file()


def out_folder(ckpt: str) -> Path:
    """Return RUN/eval/final for RUN/final; out/eval/NAME for what is not a checkpoint of a run."""
    path = Path(ckpt)
    if is_of_run(path):
        return path.parent / "eval" / path.name
    return Path("out") / "eval" / (path.stem if path.suffix == ".gguf" else path.absolute().name)


def weights_of(ckpt: str, dtype: str) -> dict[str, Any]:
    """Return what identifies a measured model: its place, and sizes and times of its files."""
    path = Path(ckpt)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    files = [file for file in files if file.name != CARD]  # which is renewed with the scores
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"ckpt": str(path.absolute()), "dtype": dtype, "files": stamps}


def write_scores(out: Path, ckpt: str, weights: dict[str, Any], measured: Sequence[Measured]) -> list[Path]:
    """Write the scores beside those that the same weights have of other suites, and the page and picture of all."""
    found = read_scores(out) if (out / SCORES).is_file() else {}
    suites = found.get("suites", {}) if found.get("weights") == weights else {}
    suites.update({one.name: asdict(one) for one in measured})
    all_of_them = [_measured(one) for one in suites.values()]
    text = json_text({"ckpt": ckpt, "weights": weights, "suites": suites}, indent=2) + "\n"
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / SCORES) as file:
            file.write(text.encode())
        (out / "scores.md").write_text(markdown(ckpt, all_of_them), encoding="utf8", errors="backslashreplace")
    draw(ckpt, all_of_them, out / "scores.png")
    return [path for path in (out / SCORES, out / "scores.md", out / "scores.png") if path.is_file()]


def read_scores(folder: Path) -> dict[str, Any]:
    """Return {"ckpt": ..., "suites": {name: ...}} as `write_scores` wrote it. Raises `UserError` for any other file."""
    path = folder / SCORES
    try:
        found = json.loads(path.read_text(encoding="utf8"))
        for one in found["suites"].values():
            _measured(one)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; measure with eval/run.py") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"{path}: not scores as eval/run.py writes them; delete the file and measure again") from None
    return found


def _measured(one: dict[str, Any]) -> Measured:
    """Return it as a score; raises `ValueError` or its like for what `write_scores` has never written."""
    found = Measured(**{**one, "scores": [Score(**score) for score in one["scores"]]})
    numbers = [found.items, found.cut, found.seconds]
    for score in found.scores:
        interval = (score.low, score.high) if score.low is not None or score.high is not None else ()
        numbers += [score.value, score.items, *interval, 0.0 if score.chance is None else score.chance]
    texts = [found.name, found.content, *(text for score in found.scores for text in (score.group, score.metric))]
    "".join(texts).encode()  # raises for what is not a text, and for half of a character
    if not isinstance(found.settings, dict) or not all(isinstance(score.share, bool) for score in found.scores):
        raise TypeError("settings or a share of another type")
    if not all(map(math.isfinite, numbers)):
        raise ValueError("values that are not finite")
    return found


def cells(name: str, score: Score) -> list[str]:
    """Return one line of the table: value, interval and chance side by side."""
    interval = "" if score.low is None else f"{shown(score.low, score)} to {shown(score.high, score)}"
    chance = "" if score.chance is None else shown(score.chance, score)
    return [name, score.group, score.metric, shown(score.value, score), interval, chance, str(score.items)]


def shown(value: float, score: Score) -> str:
    if score.share:
        return f"{value:.1%}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def markdown(model: str, measured: Sequence[Measured]) -> str:
    """Return the page of all suites: the whole of each first, then its groups."""
    lines = [f"# {model}", ""]
    lines += table([cells(one.name, score) for one in measured for score in one.scores if score.group in WHOLE])
    for one in measured:
        groups = [cells(one.name, score) for score in one.scores if score.group not in WHOLE]
        lines += ["", f"## {one.name}", "", *table(groups)] if groups else []
    for one in measured:
        cut = f"{one.name}: {one.cut} of {one.items} questions had no room in the context and lost their beginning"
        lines += ["", cut] if one.cut else []
    return "\n".join([*lines, ""])


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> list[str]:
    """Return lines of Markdown; a | in a cell stays in it."""
    inside = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in inside]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def draw(model: str, measured: Sequence[Measured], path: Path) -> None:
    """Draw the shares of each suite; all groups where they are few. Other numbers have no common scale."""
    drawn = {}
    for one in measured:
        whole_only = len({score.group for score in one.scores}) > 8
        for score in one.scores:
            if score.share and (score.group in WHOLE or not whole_only):
                drawn[f"{one.name}  {score.group}  {score.metric}".replace("  all", "")] = {model: score}
    if not drawn:
        path.unlink(missing_ok=True)
        return
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(9, 1 + 0.32 * len(drawn)), layout="constrained")
    draw_bars(axis, drawn, {model: "#4c72b0"})
    axis.set(xlim=(0, 1), xlabel="share (black: 95% interval, red: chance)", title=plain(model))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_bars(axis: Any, bars: Mapping[str, Mapping[str, Score]], colours: Mapping[str, str]) -> None:
    """Draw a bar for each run of each row, with its interval and chance. bars: label -> run -> score."""
    height = 0.8 / len(colours)
    for place, found in enumerate(bars.values()):
        for number, (run, colour) in enumerate(colours.items()):
            if run not in found:
                continue
            at, score = place - 0.4 + height * (number + 0.5), found[run]
            axis.barh(at, score.value, color=colour, height=height)
            if score.low is not None:
                axis.plot([score.low, score.high], [at, at], color="black", linewidth=1)
            if score.chance is not None:
                axis.plot([score.chance] * 2, [place - 0.4, place + 0.4], color="red", linewidth=1.5)
    axis.set_yticks(range(len(bars)), list(map(plain, bars)), fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
