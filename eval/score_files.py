"""Scores on disk: scores.json, a Markdown page for people and a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import UserError, naming
from eval.scores import WHOLE, Measured, Score
from training.run.plots import load_pyplot, plain

SCORES = "scores.json"
HEADER = ("suite", "group", "metric", "value", "95% interval", "chance", "items")


def out_folder(ckpt: str) -> Path:
    """RUN/eval/final for RUN/final; out/eval/NAME for what is no checkpoint of a run."""
    path = Path(ckpt)
    if path.is_dir() and (path.absolute().parent / "metrics.jsonl").is_file():
        return path.parent / "eval" / path.name
    return Path("out") / "eval" / (path.stem if path.suffix == ".gguf" else path.absolute().name)


def weights_of(ckpt: str, dtype: str) -> dict[str, Any]:
    """What tells a model's measurements from those of another: its place, and sizes and times of its files."""
    path = Path(ckpt)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"ckpt": str(path.absolute()), "dtype": dtype, "files": stamps}


def write_scores(out: Path, ckpt: str, weights: dict[str, Any], measured: Sequence[Measured]) -> list[Path]:
    """Write the scores beside those that the same weights have of other suites, and the page and picture of all."""
    found = read_scores(out) if (out / SCORES).is_file() else {}
    suites = found.get("suites", {}) if found.get("weights") == weights else {}
    suites.update({one.name: one.to_dict() for one in measured})
    all_of_them = [_measured(one) for one in suites.values()]
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
    written = [out / SCORES, out / "scores.md", out / "scores.png"]
    _replace(
        written[0],
        json.dumps({"ckpt": ckpt, "weights": weights, "suites": suites}, ensure_ascii=False, indent=2) + "\n",
    )
    _replace(written[1], markdown(ckpt, all_of_them))
    draw(ckpt, all_of_them, written[2])
    return [path for path in written if path.is_file()]


def read_scores(folder: Path) -> dict[str, Any]:
    """{"ckpt": ..., "suites": {name: ...}} as `write_scores` wrote it. Raises `UserError` for any other file."""
    path = folder / SCORES
    try:
        found = json.loads(path.read_text(encoding="utf8"))
        for one in found["suites"].values():
            _measured(one)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; measure with eval/run.py") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not scores as eval/run.py writes them; delete the file and measure again") from None
    return found


def _measured(one: dict[str, Any]) -> Measured:
    """Raises `ValueError` or its like for what `write_scores` has never written."""
    found = Measured(**{**one, "scores": [Score(**score) for score in one["scores"]]})
    texts, numbers = [found.name, found.content], [found.items, found.cut, found.seconds]
    for score in found.scores:
        texts += [score.group, score.metric]
        edges = [score.low, score.high] if score.low is not None or score.high is not None else []
        numbers += [score.value, score.items, *edges, 0.0 if score.chance is None else score.chance]
    if not all(isinstance(text, str) for text in texts) or not isinstance(found.settings, dict):
        raise TypeError("names that are no texts")
    if not all(isinstance(score.share, bool) for score in found.scores) or not all(map(math.isfinite, numbers)):
        raise ValueError("values that are no numbers")
    "".join(texts).encode()
    return found


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        # Half a surrogate pair, as a broken escape leaves, is no UTF-8: it is written as that escape.
        partial.write_text(text, encoding="utf8", errors="backslashreplace")
        os.replace(partial, path)


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
    lines += table([cells(one.name, score) for one in measured for score in one.scores if score.group in WHOLE])
    for one in measured:
        groups = [score for score in one.scores if score.group not in WHOLE]
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


def _is_drawn(one: Measured, score: Score) -> bool:
    """All groups where they are few, the whole where they are many."""
    return score.group in WHOLE or len({other.group for other in one.scores}) <= 8
