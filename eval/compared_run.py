"""One of several runs to be compared: its curves, and its scores where it was measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errors import UserError, one_line
from eval.score_files import SCORES, read_scores
from training.run.lines import shown
from training.run.log import read_metrics
from training.validation import MEASURED_ON

# The measures that only one stage logs; the losses of different stages are different things.
STAGES = {"reward": "rewards", "margin": "preferences", "divergence": "distillation"}


@dataclass(frozen=True)
class ComparedRun:
    """Attributes: entries: of metrics.jsonl, in order; suites: of scores.json, by name; folder: the run's.

    Entries or suites may be empty.
    """

    name: str
    entries: list[dict[str, Any]]
    suites: dict[str, dict[str, Any]]
    folder: Path = Path()

    @classmethod
    def open(cls, folder: str, live: bool = False) -> ComparedRun:
        """Open a run, a checkpoint in one, or a folder with scores. Raises `UserError` for anything else.

        live: a run that has logged nothing yet is one too.
        """
        path = Path(folder)
        run = path if (path / "metrics.jsonl").is_file() or (path / SCORES).is_file() else path.absolute().parent
        entries = [shown(entry) for entry in read_metrics(run / "metrics.jsonl")]
        found = [path] if (path / SCORES).is_file() else _measured(run, path)
        begun = live and (run / "metrics.jsonl").is_file()
        if not path.is_dir() or not (entries or found or begun):
            raise UserError(
                f"{folder}: neither metrics.jsonl nor {SCORES} in it; name a run folder, or measure it first"
            )
        suites = read_scores(found[0])["suites"] if found else {}
        return cls(folder, entries, suites, run)

    @property
    def stage(self) -> str:
        """What its loss is a loss of."""
        keys = {key for entry in self.entries for key in entry}
        return next((stage for key, stage in STAGES.items() if key in keys), "next token")

    def last(self, key: str) -> float | None:
        """Return the last value of a measure."""
        return next((entry[key] for entry in reversed(self.entries) if entry.get(key) is not None), None)

    def held_out(self, key: str) -> str | None:
        """Return the name of the data that a measure was last made on; None in older runs, which have none."""
        last = next((entry for entry in reversed(self.entries) if entry.get(key) is not None), {})
        name = last.get("held_out", {}).get(MEASURED_ON[key])
        return name and one_line(name)

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The entries since the first step."""
        return [entry for entry in self.entries if entry["step"] > 0]


def open_runs(folders: Sequence[str], live: bool = False) -> list[ComparedRun]:
    """Return the runs, under names without what all paths begin with. Raises `UserError` for fewer than two.

    live: one is enough, and may have logged nothing yet.
    """
    if len(folders) < 2 and not live:
        raise UserError("compare: two runs or more are compared; name another")
    paths = [str(Path(folder)) for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError(f"compare: {max(paths, key=paths.count)} is named twice")
    common = os.path.commonpath([os.path.abspath(path) for path in paths])
    runs = [ComparedRun.open(folder, live) for folder in folders]
    names = [os.path.relpath(os.path.abspath(path), common) for path in paths]
    return [
        replace(run, name=path if name == "." else name) for path, name, run in zip(paths, names, runs, strict=True)
    ]


def _measured(run: Path, path: Path) -> list[Path]:
    """Return folders with a run's scores: those of the checkpoint that was named, of the last one, or the newest."""
    found = sorted((run / "eval").glob(f"*/{SCORES}"), key=lambda file: file.stat().st_mtime, reverse=True)
    folders = [file.parent for file in found]
    name = path.name if path.absolute() != run.absolute() else "final"
    named = [folder for folder in folders if folder.name == name]
    return named or ([] if path.absolute() != run.absolute() else folders)
