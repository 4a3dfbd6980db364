"""A run's checkpoints: ordinary Hugging Face folders with the training state and checksums in a sub-folder."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file

from errors import DamagedCheckpoint, UserError
from model import MiniDeepSeek
from model.checkpoint.folder import CARD, save_state
from model.checkpoint.weight_files import usual_mode
from text.files import json_text
from text.tokenizer import Tokenizer
from training.optim.build import state_tensors
from training.settings import StageSettings

if TYPE_CHECKING:
    from training.parallel.sharding import Shards

STATE_SHARDS = "training/state-{:05}-of-{:05}.safetensors"  # where ranks hold shards: of each rank
SHARDING = "DCP_SHARDING_INFO"  # as torch.distributed.checkpoint's HuggingFaceStorageReader reads them
Resume = bool | Literal["last-good"]
MANIFEST = "training/manifest.json"  # size and checksum of every file of a checkpoint
STATE_FILE, PROGRESS_FILE = "training/state.safetensors", "training/progress.json"
STEP = re.compile(r"step-(\d+)$")
BEST = "best"
DATA = "data|"  # before the names of a data set's tensors in the state; the optimiser's begin with a parameter's
# A stage is judged by the first of these that its validation has; 1 where more is better, -1 where less is.
MEASURES = {"val_accuracy": 1, "val_bits_per_byte": -1, "val_loss": -1}
REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make the folder writable and use --resume"),
    errno.ENOENT: "bring the folder back and use --resume",
}


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done; tokens: positions seen, counted or not, or those of completions that were trained
            on; seconds: of training, over all sittings.
        samples: those of all steps done, where steps are of several sizes; else 0, and not written down.
        finished: the budget is spent. run: settings that must not change between sittings.
        skipped: steps among `step` that were left out, since their loss or gradient was not finite.
        best: measure, value and step of the best validation; stale: how many have come since.
        late: the log's entry of `step`, where a signal came before the validation that was due: it is logged with it.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    finished: bool = False
    run: dict[str, object] = field(default_factory=dict)
    skipped: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    stale: int = 0
    late: dict[str, Any] = field(default_factory=dict)
    samples: int = 0

    def __post_init__(self) -> None:
        """Raises `ValueError` for what no run ever wrote: progress.json may be damaged."""
        counts = (self.step, self.skipped, self.stale, self.samples)
        numbers = (*counts, self.tokens, self.seconds, abs(self.best.get("value", 0)))
        fits = all(type(value) in (int, float) and 0 <= value < math.inf for value in numbers)
        fits = fits and all(type(value) is int for value in counts)
        fits = fits and isinstance(self.run, dict) and isinstance(self.late, dict)
        if not fits or self.best.keys() not in (set(), {"measure", "value", "step"}):
            raise ValueError("not the progress of a run")

    def judge(self, held_out: dict[str, Any]) -> bool:
        """Note a validation after `step`. Returns whether it is finite and better than all before."""
        name = next((name for name in MEASURES if name in held_out), None)
        value = float(held_out.get(name, math.nan))
        before = self.best.get("value") if self.best.get("measure") == name else None
        better = math.isfinite(value) and (before is None or MEASURES[name] * (value - before) > 0)
        if better:
            self.best = {"measure": name, "value": value, "step": self.step}
        self.stale = 0 if better else self.stale + 1
        return better


class Weights(Protocol):
    """What of a model a checkpoint holds."""

    model: MiniDeepSeek

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return them themselves, not copies; where ranks hold shards, whole ones that this rank is to write."""

    def write(self, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        """Write a copy of `tensors()`, and what else belongs to it, into a folder. Called while training continues.

        Where ranks hold shards, on each that has tensors.
        """

    def load(self, folder: Path) -> None:
        """Put those of a folder in place. Raises `UserError` when they are of another model."""


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
        resolve_name("training.run.resume:same_shape")(folder, saved.config, self.model.config)
        self.model.load_state_dict(saved.state_dict())


class Snapshot:
    """What a checkpoint holds of a moment: `tensors`, to be copied before training continues, and the rest.

    data: the state of a data set that the model makes itself, if it has any. shards: of the weights, where this rank
    has no more; all ranks then make the snapshot together, and each writes its share of it.
    """

    def __init__(
        self,
        weights: Weights,
        tokenizer: Tokenizer,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        data: dict[str, torch.Tensor] | None = None,
        shards: Shards | None = None,
    ) -> None:
        self._weights, self._tokenizer, self._progress = weights, tokenizer, asdict(progress)
        if not progress.samples:
            del self._progress["samples"]
        made = {f"{DATA}{name}": value for name, value in (data or {}).items()}
        state = state_tensors(optimizer, shards or weights.model) | made
        self._state_file, self._metadata = STATE_FILE, None
        if shards:
            state = {name: tensor for name, tensor in state.items() if shards.writes(name, tensor)}
            self._state_file, first = STATE_SHARDS.format(*shards.number), {}
            for name, tensor in state.items():
                rows = shards.state_rows(name)
                first[name] = {"saved_offsets": [rows.start or 0, *[0] * (tensor.dim() - 1)][: tensor.dim()]}
            self._metadata = {SHARDING: json.dumps(first, sort_keys=True, ensure_ascii=False)}
        self.tensors = {"weights": dict(weights.tensors()), "state": state}

    def write(
        self,
        folder: Path,
        tensors: dict[str, dict[str, torch.Tensor]],
        main: bool = True,
        agree: Callable[[Callable[[], object]], None] = lambda work: work(),
    ) -> None:
        """Write it with a copy of its tensors under a temporary name, flush it, and rename it.

        So it is complete or not there. Raises `UserError` when it cannot be written, on the main rank alone.

        main: whether this is the main rank; agree: does a piece of work on all ranks, and raises `OSError` on each
        where one of them failed.
        """
        temporary, before, out = folder.with_name(f".{folder.name}.partial"), _before(folder), folder.parent
        gone = FileNotFoundError(errno.ENOENT, "the run folder has vanished", str(out))

        def begin() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            if not out.is_dir():  # made again, it might lie on another disk
                raise gone
            (temporary / "training").mkdir(parents=True)

        try:
            agree(begin if main else _nothing)
            agree(lambda: self._write_tensors(temporary, tensors))
            if not main:
                return
            self._tokenizer.save(temporary)
            (temporary / PROGRESS_FILE).write_text(json_text(self._progress, indent=2), encoding="utf8")
            write_manifest(temporary)
            if (folder / CARD).is_file():  # a person may have edited it, so it is in no manifest
                shutil.copyfile(folder / CARD, temporary / CARD)
            for path in [*temporary.rglob("*"), temporary]:
                _flush(path)
            if folder.is_dir():  # the end of a run that was given a larger budget
                shutil.rmtree(before, ignore_errors=True)
                os.replace(folder, before)
            os.replace(temporary, folder)
            _flush(out)
            shutil.rmtree(before, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            if not main:
                return
            cause = error if out.is_dir() else gone  # it may have vanished meanwhile
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                give_back(folder)
            last = newest(out)
            safe = f"the checkpoint before it is intact: {last}" if last else "no checkpoint was there before"
            remedy = REMEDIES.get(getattr(cause, "errno", None), "free some space and use --resume")
            raise UserError(f"{folder}: could not be saved ({cause}); {safe}; {remedy}") from None

    def _write_tensors(self, folder: Path, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        if tensors["weights"]:
            self._weights.write(tensors["weights"], folder)
        state = {name: tensor.cpu().contiguous() for name, tensor in tensors["state"].items()}
        with usual_mode(folder / self._state_file) as path:
            save_file(state, path, self._metadata)
        _flush(path)


def _nothing() -> None:
    pass


def give_back(folder: Path) -> None:
    """Return its name to the checkpoint that made room for another, which then never came: its save failed."""
    if _before(folder).is_dir() and not folder.exists():
        os.replace(_before(folder), folder)


def _before(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.before")


def read_progress(folder: Path) -> Progress:
    """Return how far the run was at this checkpoint. Raises `DamagedCheckpoint`, without a remedy."""
    path = folder / PROGRESS_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf8"))
        facts.pop("unmeasured", None)  # of checkpoints from before `late`
        return Progress(**facts)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error})") from None


def checkpoints(out: Path) -> list[Path]:
    """Return all checkpoints of a run, oldest first: its end is the newest, unless a larger budget took it further."""
    found, final = [path for path in out.glob("step-*") if STEP.match(path.name)], out / "final"
    return sorted([*found, final] if final.is_dir() else found, key=_step)


def newest(out: Path) -> Path | None:
    """Return `out`/final when the run is complete, else the last step checkpoint, else None."""
    found = checkpoints(out)
    return found[-1] if found else None


def holds_run(out: Path) -> bool:
    """Return whether something of a run is in the folder: a checkpoint, or one that made room for another."""
    return newest(out) is not None or any(path.is_dir() for path in (out / BEST, *out.glob(".*.before")))


def saved_run(out: Path, resume: Resume) -> dict[str, Any]:
    """Return what a run that is to be resumed may not change; empty where no checkpoint of it can be read."""
    for folder in reversed(checkpoints(out)) if resume and out.is_dir() else ():
        with suppress(DamagedCheckpoint):
            return read_progress(folder).run
    return {}


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


def keep_last(out: Path, count: int) -> None:
    """Delete all but the last `count` step checkpoints."""
    for path in [path for path in checkpoints(out) if path.name != "final"][: -count or None]:
        shutil.rmtree(path, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Note size and checksum of every file of a checkpoint folder. XXH3, which reads a GB in less than 0.1 s."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3_128": checksum(path)} for path in paths
    }
    (folder / MANIFEST).write_text(json_text(files, indent=2), encoding="utf8")


def _step(folder: Path) -> float:
    """Return how many steps a checkpoint has behind it; a `final` that does not tell stays the newest."""
    if match := STEP.match(folder.name):
        return int(match[1])
    try:
        return read_progress(folder).step
    except DamagedCheckpoint:
        return math.inf


def checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Make sure that a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
