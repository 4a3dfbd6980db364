"""The training state of a checkpoint, read and put in place: all of it at --resume, moments at --carry_optimizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from errors import DamagedCheckpoint, UserError
from training.optim.build import MOMENTS
from training.run.checkpoint import DATA, SHARDING, STATE_FILE
from training.run.progress import read_progress
from training.settings import StageSettings

if TYPE_CHECKING:
    from training.parallel.sharding import Shards

LEAVE = "leave --carry_optimizer out"


def load_training_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, shards: Shards | None = None
) -> dict[str, torch.Tensor]:
    """Put the optimiser state of `folder` into objects that already hold its weights. Returns the data set's.

    shards: of the weights, where this rank has no more.

    Raises `DamagedCheckpoint`. What passed its checksums and does not fit was saved under other settings, and so were
    the checkpoints before it: `--resume last-good` would end here again, so it is not offered.
    """
    aside, path = f"or move {folder} elsewhere and use --resume", folder / STATE_FILE
    state = read_state(folder, aside, shards)
    data = {name.removeprefix(DATA): state.pop(name) for name in list(state) if name.startswith(DATA)}
    try:
        load_state_tensors(optimizer, shards or model, state)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        settings = f"give the settings that the run began with, {aside}"
        raise DamagedCheckpoint(f"{path}: does not fit the model ({error}); {settings}") from None
    return data


def state_files(folder: Path) -> list[Path]:
    """Return those of optimiser and data set: one, or those of the ranks that held shards."""
    found = sorted(folder.glob(STATE_FILE.replace(".", "-*-of-*.")))
    return [folder / STATE_FILE] if (folder / STATE_FILE).is_file() or not found else found


def read_state(folder: Path, remedy: str, shards: Shards | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of optimiser and data set, or this rank's share of them. Raises `DamagedCheckpoint`.

    Each is in one piece, or in several of some of its rows, written by one rank each.
    """
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    path = folder / STATE_FILE
    try:
        for path in state_files(folder):
            with safe_open(path, "pt") as file:
                offsets = json.loads((file.metadata() or {}).get(SHARDING, "{}"))
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    # `rng` is of older checkpoints: now a function of seed, step, micro-batch and rank.
                    rows = None if name.startswith("rng") else shards.state_rows(name) if shards else slice(None)
                    if rows is None:  # of no weight that is here
                        continue
                    view, first = file.get_slice(name), offsets.get(name, {}).get("saved_offsets", [])
                    if not (shape := view.get_shape()) or (rows == slice(None) and not any(first)):
                        pieces.setdefault(name, []).append((0, file.get_tensor(name)))
                        continue
                    begin, last = first[0] if first else 0, math.inf if rows.stop is None else rows.stop
                    start, stop = max(rows.start or 0, begin), min(last, begin + shape[0])
                    if start < stop:
                        pieces.setdefault(name, []).append((start, view[start - begin : stop - begin]))
                    elif rows.start == rows.stop and name not in pieces:  # a rank without rows
                        pieces[name] = [(0, file.get_tensor(name)[:0])]
        joined = {}
        for name in list(pieces):
            parts = [part for _, part in sorted(pieces.pop(name), key=lambda piece: piece[0])]
            joined[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        what = f"damaged or cut short ({error}); restore the file, {remedy}"
        raise DamagedCheckpoint(f"{path}: {what}") from None
    return joined


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Undo `state_tensors`. Raises `KeyError` or `ValueError` for what is not a state of these parameters."""
    parameters = dict(model.named_parameters())
    parts: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        parameter, key, *part = name.split("|")
        p = parameters[parameter]
        if part:
            parts.setdefault((parameter, key), {})[part[0]] = value.to(p.device)
            continue
        dtype = getattr(optimizer, "moment_dtype", p.dtype)
        is_moment = key in (*MOMENTS, "momentum_buffer")
        if (is_moment and (value.shape, value.dtype) != (p.shape, dtype)) or (key == "step" and value.numel() != 1):
            raise ValueError(f"{name} is {value.dtype} of shape {tuple(value.shape)}")
        # The step counter stays where the fused kernel wants it: beside the parameter; bitsandbytes counts in int.
        counter = value.dim() == 0 and not value.is_floating_point()
        stays = key == "step" and getattr(optimizer, "counts_on_host", False)
        optimizer.state[p][key] = int(value) if counter else value if stays else value.to(p.device)
    for (parameter, key), held in parts.items():
        from torchao.optim.subclass_8bit import OptimState8bit

        # The second moment has no sign.
        p = parameters[parameter]
        state = OptimState8bit(held["codes"], held["scale"], held["qmap"], signed=key == "exp_avg")
        optimizer.state[p][key] = state.view(p.shape)
    for state in optimizer.state.values():
        if not {*MOMENTS, "step"} <= {*state} and ({*MOMENTS} & {*state} or {*state} == {"step"}):
            raise ValueError(f"a parameter with {', '.join(sorted(state))} alone")


def check_carried(settings: StageSettings) -> None:
    """Raise `UserError`, before minutes are spent, where --carry_optimizer finds no state, or that of another kind."""
    ckpt = getattr(settings, "ckpt", "")
    if not ckpt:
        raise UserError("--carry_optimizer: takes the state beside the weights of --ckpt; give it, or leave it out")
    if not state_files(Path(ckpt))[0].is_file():
        raise UserError(f"{ckpt}: has no training state to carry on; name a checkpoint of a run, or {LEAVE}")
    kind, ours = read_progress(Path(ckpt)).run.get("optim.kind", settings.optim.kind), settings.optim.kind
    if kind != ours:
        raise UserError(f"{ckpt}: its optimizer is {kind}, this run's {ours}; give --optim.kind {kind}, or {LEAVE}")


def carry_optimizer(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, shards: Shards | None = None
) -> str:
    """Put the moments of the weights that are trained in place, with their own step counts. Returns a line on it.

    Adam's counts correct the bias that its moments have in the first steps, so they go where the moments go. Weights
    without any there, such as an MTP chain that had not been trained, begin without. Raises `UserError`, or
    `DamagedCheckpoint` for a file that cannot be read.
    """
    state = read_state(folder, f"or {LEAVE}", shards)
    members = {id(p) for group in optimizer.param_groups for p in group["params"]}
    known = dict((shards or model).named_parameters())
    trained = {name for name, p in known.items() if id(p) in members}
    names = {key: key.split("|")[0] for key in state if not key.startswith(DATA)}  # data belongs to that run
    try:
        if strange := sorted(name for name in names.values() if name not in known):
            raise ValueError(f"it has {strange[0]}")
        if not (found := trained & {*names.values()}):
            raise ValueError("it has none of the weights that are trained here")
        carried = {key: state[key] for key, name in names.items() if name in trained}
        load_state_tensors(optimizer, shards or model, carried)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: its training state does not fit this run ({error}); {LEAVE}") from None
    return f"optimizer  moments of {len(found)} of {len(trained)} weights from {folder}; step and schedule start again"
