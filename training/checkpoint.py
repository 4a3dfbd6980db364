"""A run's checkpoints: ordinary Hugging Face folders with the training state in a sub-folder."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from errors import DamagedCheckpoint, UserError
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.optim import load_state_tensors, state_tensors

STEP = re.compile(r"step-(\d+)$")
DATA = "data|"  # before the names of a data set's tensors; the optimiser's begin with a parameter's name


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done; tokens: positions seen, counted or not; seconds: of training, over all sittings.
        finished: the budget is spent. run: settings that must not change between sittings.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    finished: bool = False
    run: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `ValueError` for what no run ever wrote: progress.json may be damaged."""
        numbers = all(type(value) in (int, float) and 0 <= value < math.inf for value in (self.tokens, self.seconds))
        if type(self.step) is not int or self.step < 0 or not numbers or not isinstance(self.run, dict):
            raise ValueError("not the progress of a run")


class Weights(Protocol):
    """What of a model a checkpoint holds."""

    model: MiniDeepSeek

    def save(self, folder: Path) -> None:
        """Write them into a folder."""

    def load(self, folder: Path) -> None:
        """Put those of a folder in place. Raises `UserError` when they are of another model."""


def save_checkpoint(
    folder: Path,
    weights: Weights,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    data: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write all of a checkpoint under a temporary name, flush it, and give it its name: complete or not there.

    data: the state of a data set that the model makes itself, if it has any.
    """
    temporary, before = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "before"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / "training").mkdir(parents=True)
        weights.save(temporary)
        tokenizer.save(temporary)
        state = state_tensors(optimizer, weights.model)
        state["rng"] = torch.get_rng_state()
        state.update({f"{DATA}{name}": value for name, value in (data or {}).items()})
        save_file(state, temporary / "training" / "state.safetensors")
        (temporary / "training" / "progress.json").write_text(json.dumps(asdict(progress), indent=2), encoding="utf8")
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        if folder.is_dir():  # the end of a run that was given a larger budget
            shutil.rmtree(before, ignore_errors=True)
            os.replace(folder, before)
        os.replace(temporary, folder)
        _flush(folder.parent)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = newest(folder.parent)
        safe = f"the checkpoint before it is intact: {kept}" if kept else "no checkpoint was there before"
        raise UserError(f"{folder}: could not be saved ({error}); {safe}; free some space and use --resume") from None


def load_training_state(folder: Path, model: MiniDeepSeek, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimiser and random state of `folder`, into objects that already hold its weights. Returns the data set's."""
    path = folder / "training" / "state.safetensors"
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: damaged or cut short ({error}); delete {folder} and use --resume") from None
    try:
        random = state.pop("rng")
        data = {name.removeprefix(DATA): state.pop(name) for name in list(state) if name.startswith(DATA)}
        load_state_tensors(optimizer, model, state)
        torch.set_rng_state(random)
    except KeyError as error:
        raise DamagedCheckpoint(
            f"{path}: state of an unknown parameter {error}; delete {folder} and use --resume"
        ) from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise DamagedCheckpoint(f"{path}: does not fit the model ({error}); delete {folder} and use --resume") from None
    return data


def read_progress(folder: Path) -> Progress:
    """How far the run was at this checkpoint."""
    path = folder / "training" / "progress.json"
    try:
        return Progress(**json.loads(path.read_text(encoding="utf8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error}); delete {folder} and use --resume") from None


def steps(out: Path) -> list[Path]:
    """The step checkpoints of a run, oldest first."""
    return sorted((path for path in out.glob("step-*") if STEP.match(path.name)), key=_step)


def newest(out: Path) -> Path | None:
    """`out`/final when the run is complete, else the last step checkpoint, else None."""
    found, final = steps(out), out / "final"
    if not final.is_dir():
        return found[-1] if found else None
    # A complete run that was given a larger budget has step checkpoints beyond its old end.
    return found[-1] if found and _step(found[-1]) > _step(final) else final


def keep_last(out: Path, count: int) -> None:
    """Delete all but the last `count` step checkpoints."""
    for path in steps(out)[: -count or None]:
        shutil.rmtree(path, ignore_errors=True)


def _step(folder: Path) -> float:
    """How many steps a checkpoint has behind it; a `final` that does not tell stays the newest."""
    if match := STEP.match(folder.name):
        return int(match[1])
    try:
        return read_progress(folder).step
    except DamagedCheckpoint:
        return math.inf


def _flush(path: Path) -> None:
    """Make sure that a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
