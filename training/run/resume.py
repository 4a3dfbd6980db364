"""What happens at --resume and --carry_optimizer: find a checkpoint, verify it, restore it; refuse another run's."""

from __future__ import annotations

import re
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import xxhash

from errors import DamagedCheckpoint, UserError
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.checkpoint.folder import save_state
from text.tokenizer import Tokenizer
from training.optim.build import load_state_tensors
from training.run.checkpoint import (
    BEST,
    DATA,
    MANIFEST,
    PROGRESS_FILE,
    Progress,
    checkpoints,
    give_back,
    newest,
    read_progress,
    read_state,
    state_files,
    verify,
)  # fmt: skip
from training.settings import StageSettings

if TYPE_CHECKING:
    from training.parallel.sharding import Shards

Resume = bool | Literal["last-good"]
LAST_GOOD = "last-good"
LEAVE = "leave --carry_optimizer out"
SAMPLES = re.compile(r"(\d+) samples of (\w+), shares ([\d:]+)")  # as the identity of conversations and pairs begins


def check_unused(out: Path, resume: Resume) -> None:
    """Raise `UserError` when there is a run in `out` but nobody asked to resume it."""
    found = newest(out) if out.is_dir() else None
    if found is None and (out / BEST).is_dir():  # of a run that died before its first other checkpoint
        found = out / BEST
    if found is not None and not resume:
        raise UserError(
            f"{out}: holds a run already ({found.name}); add --resume to continue it, or choose another --out"
        )


def find_checkpoint(out: Path, resume: Resume, run: dict[str, Any]) -> tuple[Path, Progress] | None:
    """Return the newest checkpoint of a run folder, verified, and how far it is, or None where there is none.

    Args:
        resume: `LAST_GOOD` sets checkpoints aside that are damaged, and takes the newest that is not.
        run: what the order of the data depends on, which must be what it was.

    Raises `UserError` when there is a run but nobody asked to resume it, or it was another one, and
    `DamagedCheckpoint` when the newest is damaged.
    """
    give_back(out / "final")
    give_back(out / BEST)
    check_unused(out, resume)
    while (found := newest(out) if out.is_dir() else None) is not None:
        try:
            verify(found)
            progress = read_progress(found)
            break
        except DamagedCheckpoint as error:
            if resume != LAST_GOOD:
                older = [path for path in checkpoints(out) if path != found]
                remedy = "no older checkpoint is there; choose another --out to begin again"
                remedy = f"--resume last-good continues from the one before it, {older[-1]}" if older else remedy
                raise DamagedCheckpoint(f"{error}; {remedy}") from None
            aside = found.with_name(f"damaged-{found.name}")
            shutil.rmtree(aside, ignore_errors=True)
            found.replace(aside)
            print(f"notice: {error}; set aside as {aside}", file=sys.stderr)
    else:
        return None
    for name, value in run.items():
        _unchanged(found, name, progress.run.get(name, value), value)
    progress.run = {**progress.run, **run}  # what an older run did not write down is held to from here on
    return found, progress


def saved_run(out: Path, resume: Resume) -> dict[str, Any]:
    """Return what a run that is to be resumed may not change; empty where no checkpoint of it can be read."""
    for folder in reversed(checkpoints(out)) if resume and out.is_dir() else ():
        with suppress(DamagedCheckpoint):
            return read_progress(folder).run
    return {}


def contents(folder: Path) -> str | None:
    """Return the same for the same checkpoint, as this process sees it; None where it sees none."""
    digest = xxhash.xxh3_128()
    try:
        digest.update((folder / PROGRESS_FILE).read_bytes())
        with suppress(FileNotFoundError):  # of folders older than manifests
            digest.update((folder / MANIFEST).read_bytes())
    except OSError:
        return None
    return digest.hexdigest()


def identity(settings: StageSettings, tokenizer: Tokenizer, dataset: object) -> dict[str, Any]:
    """Return what the data, their order and the optimiser's state depend on: a run cannot change it midway.

    `data.content` is for data sets whose `identity` does not tell their content; a run that lacks a key may resume.
    """
    run = {
        "seed": settings.seed,
        "sequence_length": settings.sequence_length,
        "rows": settings.rows,
        "tokenizer": tokenizer.fingerprint,
        "data": getattr(dataset, "identity", ""),
        "optim.kind": settings.optim.kind,
    }
    if settings.rows_by_share:
        run["rows"] = {str(share): rows for share, rows in settings.rows_by_share.items()}
    content = getattr(dataset, "content", "")
    return {**run, "data.content": content} if content else run


class WholeModel:
    """The weights of a checkpoint that stands for itself: all of the model's."""

    def __init__(self, model: MiniDeepSeek) -> None:
        self.model = model

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def write(self, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        save_state(tensors, self.model.config, folder)

    def load(self, folder: Path) -> None:
        saved = MiniDeepSeek.from_pretrained(folder)
        same_shape(folder, saved.config, self.model.config)
        self.model.load_state_dict(saved.state_dict())


def same_shape(folder: Path, saved: LMConfig, config: LMConfig) -> None:
    """Raise `UserError` unless the model of `folder` has the configuration that this run has."""
    for name, value in asdict(config).items():
        _unchanged(folder, f"model.{name}", getattr(saved, name), value)


def _unchanged(folder: Path, name: str, before: Any, now: Any) -> None:
    if before != now:
        change = _other_data(name, before, now) or f"was trained with {name} = {before}, not {now}"
        raise UserError(f"{folder}: {change}; a run cannot change it midway")


def _other_data(name: str, before: Any, now: Any) -> str:
    """Say without its hashes what has become of the data; empty where something else has changed."""
    if name == "data.content":
        return "the data changed (as many before and now, other content)"
    old, new = (SAMPLES.match(str(value)) for value in (before, now))
    if name != "data" or old is None or new is None or old.groups() == new.groups():
        return ""
    if old[1] != new[1]:
        return f"the data changed ({old[1]} samples before, {new[1]} now)"
    what = "other content" if old[2] != new[2] else "in other shares"
    return f"the data changed ({new[1]} samples before and now, {what})"


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
    folder: Path, model: MiniDeepSeek, optimizer: torch.optim.Optimizer, shards: Shards | None = None
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
