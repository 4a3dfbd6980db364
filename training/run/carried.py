"""The optimiser's moments of another run's checkpoint, for a run that begins with its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from errors import DamagedCheckpoint, UserError
from model import MiniDeepSeek
from training.optim.build import load_state_tensors
from training.run.checkpoint import DATA, read_progress
from training.settings import StageSettings

LEAVE = "leave --carry_optimizer out"


def check_carried(settings: StageSettings) -> None:
    """Before minutes are spent: raises `UserError` where --carry_optimizer finds no state, or that of another kind."""
    ckpt = getattr(settings, "ckpt", "")
    if not ckpt:
        raise UserError("--carry_optimizer: takes the state beside the weights of --ckpt; give it, or leave it out")
    if not _state(Path(ckpt)).is_file():
        raise UserError(f"{ckpt}: has no training state to carry on; name a checkpoint of a run, or {LEAVE}")
    kind, wanted = read_progress(Path(ckpt)).run.get("optim.kind", settings.optim.kind), settings.optim.kind
    if kind != wanted:
        raise UserError(f"{ckpt}: its optimizer is {kind}, this run's {wanted}; give --optim.kind {kind}, or {LEAVE}")


def carry_optimizer(folder: Path, model: MiniDeepSeek, optimizer: torch.optim.Optimizer) -> str:
    """Put the moments of the weights that are trained in place, with their own step counts. Returns a line on it.

    Adam's counts correct the bias that its moments have in the first steps, so they go where the moments go. Weights
    without any there, such as an MTP chain that had not been trained, begin without. Raises `UserError`, or
    `DamagedCheckpoint` for a file that cannot be read.
    """
    try:
        state = load_file(_state(folder))
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{_state(folder)}: damaged or cut short ({error}); restore the file") from None
    members = {id(p) for group in optimizer.param_groups for p in group["params"]}
    known = dict(model.named_parameters())
    trained = {name for name, p in known.items() if id(p) in members}
    # `rng` is of older checkpoints; what a data set saved belongs to that run.
    names = {key: key.split("|")[0] for key in state if not key.startswith((DATA, "rng"))}
    try:
        if strange := sorted(name for name in names.values() if name not in known):
            raise ValueError(f"it has {strange[0]}")
        if not (found := trained & {*names.values()}):
            raise ValueError("it has none of the weights that are trained here")
        load_state_tensors(optimizer, model, {key: state[key] for key, name in names.items() if name in trained})
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: its training state does not fit this run ({error}); {LEAVE}") from None
    return f"optimizer  moments of {len(found)} of {len(trained)} weights from {folder}; step and schedule start again"


def _state(folder: Path) -> Path:
    return folder / "training" / "state.safetensors"
