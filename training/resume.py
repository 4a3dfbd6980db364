"""Taking up a run where it was left, and refusing what would make it another run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from errors import UserError
from LMConfig import LMConfig
from model import MiniDeepSeek
from training.checkpoint import Progress, Weights, load_training_state, newest, read_progress


def left_off(out: Path, resume: bool, run: dict[str, Any]) -> tuple[Path, Progress] | None:
    """The newest checkpoint of a run folder and how far it is, or None where there is none.

    Args:
        run: what the order of the data depends on, which must be what it was.

    Raises `UserError` when there is a run but nobody asked to go on with it, or it was another one.
    """
    found = newest(out) if out.is_dir() else None
    if found is None:
        return None
    if not resume:
        raise UserError(f"{out}: holds a run already ({found.name}); add --resume to go on, or choose another --out")
    progress = read_progress(found)
    for name, value in run.items():
        _unchanged(found, name, progress.run.get(name, value), value)
    return found, progress


class WholeModel:
    """The weights of a checkpoint that stands for itself: all of the model's."""

    def __init__(self, model: MiniDeepSeek) -> None:
        self.model = model

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        saved = MiniDeepSeek.from_pretrained(folder)
        same_shape(folder, saved.config, self.model.config)
        self.model.load_state_dict(saved.state_dict())


def take_up(folder: Path, weights: Weights, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Put a checkpoint's weights, optimiser state and random numbers in place. Returns the state of its data set."""
    weights.load(folder)
    return load_training_state(folder, weights.model, optimizer)


def same_shape(folder: Path, saved: LMConfig, wanted: LMConfig) -> None:
    """Raises `UserError` unless the model of `folder` has the configuration that this run has."""
    for name, value in asdict(wanted).items():
        _unchanged(folder, f"model.{name}", getattr(saved, name), value)


def _unchanged(folder: Path, name: str, before: Any, now: Any) -> None:
    if before != now:
        raise UserError(f"{folder}: was trained with {name} = {before}, not {now}; a run cannot change it midway")
