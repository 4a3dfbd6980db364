"""A run's checkpoints: ordinary Hugging Face folders with the training state in a sub-folder."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from errors import DamagedCheckpoint, UserError
from model import MiniDeepSeek
from model.checkpoint.tensor_file import save_file
from text.files import json_text
from text.tokenizer import Tokenizer
from training.optim.build import load_state_tensors, state_tensors
from training.run.manifest import write_manifest

STEP = re.compile(r"step-(\d+)$")
WEIGHT, STATE = "weight|", "state|"  # before the names of a snapshot's tensors
DATA = "data|"  # before the names of a data set's tensors; the optimiser's begin with a parameter's name


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done; tokens: positions seen, counted or not; seconds: of training, over all sittings.
        finished: the budget is spent. run: settings that must not change between sittings.
        skipped: steps among `step` that were left out, since their loss or gradient was not finite.
        best: measure, value and step of the best validation; stale: how many have come since.
        unmeasured: a signal came before the validation that was due after `step`.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    finished: bool = False
    run: dict[str, object] = field(default_factory=dict)
    skipped: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    stale: int = 0
    unmeasured: bool = False

    def __post_init__(self) -> None:
        """Raises `ValueError` for what no run ever wrote: progress.json may be damaged."""
        numbers = all(type(value) in (int, float) and 0 <= value < math.inf for value in (self.tokens, self.seconds))
        counts = all(type(value) is int and value >= 0 for value in (self.step, self.skipped, self.stale))
        if not counts or not numbers or not isinstance(self.run, dict) or not _is_best(self.best):
            raise ValueError("not the progress of a run")


def _is_best(best: object) -> bool:
    """Whether a run may have noted it as its best validation; empty before there is any."""
    if not isinstance(best, dict) or (best and best.keys() != {"measure", "value", "step"}):
        return False
    return not best or (type(best["value"]) in (int, float) and math.isfinite(best["value"]))


class Weights(Protocol):
    """What of a model a checkpoint holds."""

    model: MiniDeepSeek

    def tensors(self) -> dict[str, torch.Tensor]:
        """They themselves, not copies."""

    def write(self, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        """Write a copy of `tensors()`, and what else belongs to it, into a folder. Called while training goes on."""

    def load(self, folder: Path) -> None:
        """Put those of a folder in place. Raises `UserError` when they are of another model."""


class Snapshot:
    """What a checkpoint holds of a moment: `tensors`, to be copied before training goes on, and the rest.

    data: the state of a data set that the model makes itself, if it has any.
    """

    def __init__(
        self,
        weights: Weights,
        tokenizer: Tokenizer,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        data: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self._weights, self._tokenizer, self._progress = weights, tokenizer, asdict(progress)
        self.tensors = {f"{WEIGHT}{name}": value for name, value in weights.tensors().items()}
        self.tensors |= {f"{STATE}{name}": value for name, value in state_tensors(optimizer, weights.model).items()}
        self.tensors |= {f"{STATE}{DATA}{name}": value for name, value in (data or {}).items()}

    def write(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write it with a copy of its tensors under a temporary name, flush it, and give it its name.

        So it is complete or not there. Raises `UserError` when it cannot be written.
        """
        temporary, before = folder.with_name(f".{folder.name}.partial"), _before(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            if not folder.parent.is_dir():
                # Made anew, it might lie on another disk than the one that is gone.
                raise FileNotFoundError(errno.ENOENT, "the run folder has vanished", str(folder.parent))
            (temporary / "training").mkdir(parents=True)
            self._weights.write(_part(tensors, WEIGHT), temporary)
            self._tokenizer.save(temporary)
            state = {name: tensor.cpu().contiguous() for name, tensor in _part(tensors, STATE).items()}
            save_file(state, temporary / "training" / "state.safetensors")
            text = json_text(self._progress, indent=2)
            (temporary / "training" / "progress.json").write_text(text, encoding="utf8")
            write_manifest(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                _flush(path)
            if folder.is_dir():  # the end of a run that was given a larger budget
                shutil.rmtree(before, ignore_errors=True)
                os.replace(folder, before)
            os.replace(temporary, folder)
            _flush(folder.parent)
            shutil.rmtree(before, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            cause: Exception = error
            if not folder.parent.is_dir():  # it vanished while this was written
                cause = FileNotFoundError(errno.ENOENT, "the run folder has vanished", str(folder.parent))
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                give_back(folder)
            kept = newest(folder.parent)
            safe = f"the checkpoint before it is intact: {kept}" if kept else "no checkpoint was there before"
            raise UserError(f"{folder}: could not be saved ({cause}); {safe}; {_remedy(cause)}") from None


def give_back(folder: Path) -> None:
    """Its name to the checkpoint that made room for another, which then never came: the save failed or was killed."""
    before = _before(folder)
    if before.is_dir() and not folder.exists():
        os.replace(before, folder)


def _before(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.before")


def load_training_state(folder: Path, model: MiniDeepSeek, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimiser state of `folder`, into objects that already hold its weights. Returns the data set's.

    Raises `DamagedCheckpoint`. What passed its checksums and does not fit was saved under other settings, and so were
    the checkpoints before it: `--resume last-good` would end here again, so it is not offered.
    """
    aside = f"or move {folder} elsewhere and use --resume"
    path = folder / "training" / "state.safetensors"
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: damaged or cut short ({error}); restore the file, {aside}") from None
    settings = "give the settings that the run began with"
    try:
        for name in ("rng", "rng_cuda"):  # of older checkpoints: now a function of seed, step, micro-batch and rank
            state.pop(name, None)
        data = {name.removeprefix(DATA): state.pop(name) for name in list(state) if name.startswith(DATA)}
        load_state_tensors(optimizer, model, state)
    except KeyError as error:
        raise DamagedCheckpoint(f"{path}: state of an unknown parameter {error}; {settings}, {aside}") from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise DamagedCheckpoint(f"{path}: does not fit the model ({error}); {settings}, {aside}") from None
    return data


def read_progress(folder: Path) -> Progress:
    """How far the run was at this checkpoint. Raises `DamagedCheckpoint`, for `left_off` to add the remedy."""
    path = folder / "training" / "progress.json"
    try:
        return Progress(**json.loads(path.read_text(encoding="utf8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error})") from None


def steps(out: Path) -> list[Path]:
    """The step checkpoints of a run, oldest first."""
    return sorted((path for path in out.glob("step-*") if STEP.match(path.name)), key=_step)


def checkpoints(out: Path) -> list[Path]:
    """All checkpoints of a run, oldest first: its end is the newest, unless a larger budget took it further."""
    found, final = steps(out), out / "final"
    return sorted([*found, final], key=_step) if final.is_dir() else found


def newest(out: Path) -> Path | None:
    """`out`/final when the run is complete, else the last step checkpoint, else None."""
    found = checkpoints(out)
    return found[-1] if found else None


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


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _remedy(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make the folder writable and use --resume"
    if number == errno.ENOENT:
        return "bring the folder back and use --resume"
    return "free some space and use --resume"


def _flush(path: Path) -> None:
    """Make sure that a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
