"""The tensors of a checkpoint folder, read from its safetensors files one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name

from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import DamagedCheckpoint, UserError

FP8 = "model.checkpoint.fp8"
WEIGHTS, MTP = "model.safetensors", "mtp.safetensors"


@contextmanager
def usual_mode(path: Path) -> Iterator[Path]:
    """Give a file the mode of other new files: one that safetensors writes can be read by its owner alone."""
    path.touch()
    mode = path.stat().st_mode
    yield path
    path.chmod(mode)


class WeightFiles:
    """model.safetensors, or the shards that model.safetensors.index.json lists, and mtp.safetensors beside them.

    Attributes:
        names: of all tensors, as the files hold them, and the file of each. numbers: how many are in them all.
    Raises:
        UserError: no such folder, no weights in it, or quantised by a method that is not read.
        DamagedCheckpoint: a file that is cut short, or a damaged list of shards.
    """

    def __init__(self, folder: Path) -> None:
        config = folder / "config.json"
        quantization = json.loads(config.read_text(encoding="utf8")).get("quantization_config")
        self.folder, self.block, self.is_fp8 = folder, None, quantization is not None
        if self.is_fp8:
            self.block = resolve_name(FP8).block_size(config, quantization)
        found = {path: self._sizes(path) for path in _files(folder)}
        # Each matrix right before its scales, so that the two meet at once where they are in one file.
        self._names = {path: sorted(sizes) for path, sizes in found.items()}
        self.names = {name: path for path, names in self._names.items() for name in names}
        self.numbers = sum(size for sizes in found.values() for size in sizes.values())

    def _sizes(self, path: Path) -> dict[str, int]:
        """How many numbers each tensor of a file has."""
        with _reading(path), safe_open(path, framework="pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            self.is_fp8 |= any(view.get_dtype() == "F8_E4M3" for view in views.values())
            return {name: math.prod(view.get_shape()) for name, view in views.items()}

    def __getitem__(self, name: str) -> Tensor:
        """Return one of them; FP8 dequantised, as when all are read."""
        with _reading(self.names[name]), safe_open(self.names[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        if not self.is_fp8 or tensor.dtype != (fp8 := resolve_name(FP8)).FP8:
            return tensor
        return fp8.dequantise(name, tensor, self[name + fp8.SCALE], self.block)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor; FP8 matrices are dequantised to float32 and their scales left out."""
        tensors = self._tensors()
        if self.is_fp8:
            tensors = resolve_name(FP8).dequantised(tensors, self.block, self.folder / "config.json")
        for name, tensor in tensors:
            if not tensor.is_floating_point():
                number = f"{tensor.dtype}; only floating point is read"
                raise DamagedCheckpoint(f"{self.names[name]}: weight {name} is of {number}")
            yield name, tensor

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for path, names in self._names.items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    with _reading(path):
                        tensor = file.get_tensor(name)
                    yield name, tensor


def _files(folder: Path) -> list[Path]:
    index, mtp = folder / f"{WEIGHTS}.index.json", [path for path in (folder / MTP,) if path.is_file()]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS, *mtp]
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf8"))["weight_map"].values()
            files = sorted({folder / name for name in names} | set(mtp))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DamagedCheckpoint(f"{index}: not a list of shards; restore the file") from None
        if strange := [file for file in files if file.parent != folder]:
            raise DamagedCheckpoint(f"{index}: names {strange[0]}, outside the checkpoint folder; restore the file")
        return files
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a checkpoint folder (it holds config.json and {WEIGHTS})")
    raise UserError(f"{folder}: no {WEIGHTS} in it; give a checkpoint folder such as OUT/final or OUT/step-N")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: damaged or cut short ({error}); use an older checkpoint") from None
