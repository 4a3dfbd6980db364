"""A run's checkpoints: ordinary Hugging Face folders with the training state and checksums in a sub-folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file

from errors import UserError
from model import MiniDeepSeek
from model.checkpoint.folder import CARD, save_state
from model.checkpoint.weight_files import usual_mode
from text.files import json_text
from text.tokenizer import Tokenizer
from training.optim.build import state_tensors
from training.run.progress import PROGRESS_FILE, Progress, before, give_back, newest

if TYPE_CHECKING:
    from training.parallel.sharding import Shards

STATE_SHARDS = "training/state-{:05}-of-{:05}.safetensors"  # where ranks hold shards: of each rank
SHARDING = "DCP_SHARDING_INFO"  # as torch.distributed.checkpoint's HuggingFaceStorageReader reads them
MANIFEST = "training/manifest.json"  # size and checksum of every file of a checkpoint
STATE_FILE = "training/state.safetensors"
DATA = "data|"  # before the names of a data set's tensors in the state; the optimiser's begin with a parameter's
REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make the folder writable and use --resume"),
    errno.ENOENT: "bring the folder back and use --resume",
}


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
        temporary, old, out = folder.with_name(f".{folder.name}.partial"), before(folder), folder.parent
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
                shutil.rmtree(old, ignore_errors=True)
                os.replace(folder, old)
            os.replace(temporary, folder)
            _flush(out)
            shutil.rmtree(old, ignore_errors=True)
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


def write_manifest(folder: Path) -> None:
    """Note size and checksum of every file of a checkpoint folder. XXH3, which reads a GB in less than 0.1 s."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3_128": checksum(path)} for path in paths
    }
    (folder / MANIFEST).write_text(json_text(files, indent=2), encoding="utf8")


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
