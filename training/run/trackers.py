"""Where curves and samples go beside metrics.jsonl: TensorBoard, Weights & Biases, SwanLab.

Each is imported only when asked for. Nothing leaves the machine unless the environment has a key, or a mode, that says
so: WANDB_API_KEY, WANDB_MODE, SWANLAB_API_KEY, SWANLAB_MODE.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple
from uuid import uuid4

from errors import UserError, naming

PROJECT = "mini-deepseek-v3"


class Tracker(NamedTuple):
    """What a tracker does with the numbers of a step, with its samples (rows of prompt and text), and at the end."""

    log: Callable[[dict[str, float], int], object]
    sample: Callable[[Sequence[dict[str, str]], int], object]
    close: Callable[[], object]


def tracker_names(log_to: str, wandb: str) -> list[str]:
    """Return what `--log_to` names, and wandb where `--wandb` names a project. Raises `UserError` for another name."""
    names = [name.strip() for name in log_to.split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--log_to {name}: one or more of {','.join(TRACKERS)}")
    return list(dict.fromkeys([*names, "wandb"] if wandb else names))


def check_installed(names: Sequence[str]) -> None:
    """Raise `UserError` for the trackers that are not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise UserError(f"--log_to {','.join(missing)}: not installed; pip install {' '.join(missing)}")


def open_trackers(names: Sequence[str], out: Path, step: int, project: str, config: dict[str, Any]) -> list[Tracker]:
    """Open trackers in a run folder; a run that is resumed after `step` continues its curves from there."""
    if not names:
        return []
    run = {"project": project or PROJECT, "name": out.name, "id": _run_id(out, step), "resume": "allow"}
    return [TRACKERS[name](out, step, run, config) for name in names]


def _tensorboard(out: Path, step: int, run: dict[str, str], config: dict[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # Later events of the same folder are hidden: they are about to be written again.
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else 0)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def sample(rows: Sequence[dict[str, str]], step: int) -> None:
        for number, row in enumerate(rows, 1):
            text = indent(f"{row['prompt']} | {row['text']}", "    ", lambda _: True)  # verbatim, in its Markdown
            writer.add_text(f"sample/{number}", text, step)
        writer.flush()

    return Tracker(log, sample, writer.close)


def _wandb(out: Path, step: int, run: dict[str, str], config: dict[str, Any]) -> Tracker:
    import wandb

    opened = wandb.init(dir=str(out), mode=_mode("WANDB"), config=config, **run)

    def sample(rows: Sequence[dict[str, str]], step: int) -> None:
        table = wandb.Table(columns=["prompt", "text"], data=[[row["prompt"], row["text"]] for row in rows])
        opened.log({"samples": table}, step=step)

    return Tracker(lambda values, step: opened.log(values, step=step), sample, opened.finish)


def _swanlab(out: Path, step: int, run: dict[str, str], config: dict[str, Any]) -> Tracker:
    import swanlab

    opened = swanlab.init(log_dir=str(out / "swanlab"), mode=_mode("SWANLAB"), config=config, **run)

    def sample(rows: Sequence[dict[str, str]], step: int) -> None:
        opened.log({"samples": [swanlab.Text(row["text"], caption=row["prompt"]) for row in rows]}, step=step)

    return Tracker(lambda values, step: opened.log(values, step=step), sample, opened.finish)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "swanlab": _swanlab}


def _mode(library: str) -> str:
    return os.environ.get(f"{library}_MODE") or ("online" if os.environ.get(f"{library}_API_KEY") else "offline")


def _run_id(out: Path, step: int) -> str:
    """Return what a run is known by where it is uploaded to; the same after a resume."""
    file = out / "tracker_id"
    with naming(file):
        if not step or not file.is_file():
            file.write_text(uuid4().hex[:21], encoding="utf8")  # SwanLab wants 21 letters and digits
        return file.read_text(encoding="utf8").strip()
