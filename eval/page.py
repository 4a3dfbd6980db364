"""One page of runs that opens anywhere: tables, curves, samples, sizes, time and command lines in one HTML file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from errors import UserError, naming
from eval.compared_run import ComparedRun, open_runs
from eval.comparison import draw, tables
from LMConfig import LMConfig
from model.costs import count, human
from text.files import replacing
from training.run.lines import duration
from training.run.log import read_metrics
from training.run.plots import draw_run, drawn
from training.run.progress import newest

STEPS = 6  # of a run whose samples are shown: the first, the last and some between
SAMPLES = 8  # shown of one step


class PageTable(NamedTuple):
    """A table of the page; the first column is what the others are of."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def write_page(
    folders: Sequence[str],
    file: Path,
    measured: Sequence[PageTable] = (),
    answers: Sequence[dict[str, Any]] = (),
) -> None:
    """Write the page of run folders. Raises `UserError` for what is not a run.

    measured: tables before those of the runs themselves. answers: question, answer, reply and correct of each.
    """
    runs = open_runs(folders, live=True)
    template = Environment(  # of our own text alone; whatever runs hold is escaped
        loader=FileSystemLoader(Path(__file__).parent / "web"), autoescape=True, undefined=StrictUndefined
    ).get_template("report.html.jinja")
    together = None
    if len(runs) > 1:
        draw(runs, buffer := BytesIO())
        together = _inline(buffer.getvalue())
    found = [*measured, *(PageTable(*table) for table in tables(runs))]
    parts = [{"name": run.name, **_described(run)} for run in runs]
    text = template.render(tables=found, answers=answers, together=together, runs=parts)
    with naming(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            stream.write(text.encode("utf8", "backslashreplace"))


def _described(run: ComparedRun) -> dict[str, Any]:
    """Return what the page shows of one run: facts, curves, samples, command line and settings."""
    config = run.folder / "config.yaml"
    settings = config.read_text(encoding="utf8", errors="replace") if config.is_file() else ""
    first = settings.partition("\n")[0]
    return {
        "facts": _facts(run),
        "curves": _curves(run.folder),
        "samples": _samples(run),
        "command": first.removeprefix("# ") if first.startswith("# ") else "",
        "settings": settings,
    }


def _facts(run: ComparedRun) -> dict[str, str]:
    """Return sizes and times by their labels, as far as they are known."""
    facts = {"stage": run.stage} if run.entries else {}
    checkpoint = newest(run.folder)
    if checkpoint and (checkpoint / "config.json").is_file():
        with suppress(UserError):  # a damaged checkpoint is no reason to show nothing
            costs = count(LMConfig.from_pretrained(checkpoint))
            total, activated, mtp = map(human, (costs.total, costs.activated, costs.mtp))
            facts["parameters"] = f"{total}, {activated} activated, MTP adds {mtp}"
            cache, mha = human(costs.cache_bytes, "B"), human(costs.mha_cache_bytes, "B")
            facts["cache of a token"] = f"{cache}; multi-head attention: {mha}"
    if checkpoint:
        weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        whole = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        facts["checkpoint"] = f"{checkpoint}: {human(weights, 'B')} of weights, {human(whole, 'B')} in all"
    if (seconds := run.last("seconds")) is not None:
        facts["time"] = f"{duration(seconds)} of training"
    if memory := run.last("memory"):
        facts["memory"] = human(memory, "B")
    return facts


def _curves(folder: Path) -> str | None:
    """Return the run's curves.png if it is as new as its metrics.jsonl, else curves of now, in no file of the run."""
    if not (folder / "metrics.jsonl").is_file():
        return None
    if picture := drawn(folder):
        return _inline(picture.read_bytes())
    return _inline(buffer.getvalue()) if draw_run(folder, buffer := BytesIO()) else None


def _samples(run: ComparedRun) -> list[dict[str, Any]]:
    """Return step, prompt and text of samples along the run: of samples.jsonl, else one completion of each step."""
    rows = read_metrics(run.folder / "samples.jsonl")
    if not rows:
        given = [(entry["step"], entry["sample"]) for entry in run.entries if entry.get("sample")]
        rows = [{"step": step, "prompt": one.get("question"), "text": one.get("completion")} for step, one in given]
    rows = [{name: row.get(name, "") for name in ("step", "prompt", "text")} for row in rows]
    steps = sorted({row["step"] for row in rows})
    last = len(steps) - 1
    chosen = {steps[round(place * last / (STEPS - 1))] for place in range(STEPS)} if steps else set()
    return [row for step in sorted(chosen) for row in [row for row in rows if row["step"] == step][:SAMPLES]]


def _inline(picture: bytes) -> str:
    return f"data:image/png;base64,{b64encode(picture).decode()}"
