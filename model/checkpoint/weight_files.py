"""The tensors of a checkpoint folder, read from its safetensors files one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import DamagedCheckpoint, UserError
from model.checkpoint.fp8 import FP8, SCALE, block_size, dequantise

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
        self.folder, self.block = folder, block_size(folder)
        found = {path: self._sizes(path) for path in _files(folder)}
        # Each matrix right before its scales, so that the two meet at once where they are in one file.
        self._names = {path: sorted(sizes) for path, sizes in found.items()}
        self.names = {name: path for path, names in self._names.items() for name in names}
        self.numbers = sum(size for sizes in found.values() for size in sizes.values())

    @staticmethod
    def _sizes(path: Path) -> dict[str, int]:
        """How many numbers each tensor of a file has."""
        with _reading(path), safe_open(path, framework="pt") as file:
            return {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        """Return one of them; FP8 dequantised, as when all are read."""
        with _reading(self.names[name]), safe_open(self.names[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        return dequantise(name, tensor, self[name + SCALE], self.block) if tensor.dtype == FP8 else tensor

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor; FP8 matrices are dequantised to float32 and their scales left out.

        In memory are the tensor at hand, the one before it, and FP8 halves that wait for a later file.
        """
        waiting: dict[str, Tensor] = {}
        for path, names in self._names.items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    with _reading(path):
                        tensor = file.get_tensor(name)
                    scales_of = name.removesuffix(SCALE)
                    if scales_of != name or tensor.dtype == FP8:
                        other = scales_of if scales_of != name else name + SCALE
                        if other not in waiting:
                            waiting[name] = tensor
                            continue
                        if self.block is None:
                            at = f"{self.folder / 'config.json'}: no quantization_config"
                            raise DamagedCheckpoint(f"{at}, though {scales_of} is FP8; restore the file")
                        pair = {name: tensor, other: waiting.pop(other)}
                        tensor = dequantise(scales_of, pair[scales_of], pair[scales_of + SCALE], self.block)
                        name = scales_of
                    elif not tensor.is_floating_point():
                        number = f"{tensor.dtype}; only floating point is read"
                        raise DamagedCheckpoint(f"{path}: weight {name} is of {number}")
                    yield name, tensor
        for name in sorted(waiting):
            if name.endswith(SCALE):
                raise DamagedCheckpoint(f"scales {name} are there without their FP8 matrix; fetch the files again")
            raise DamagedCheckpoint(f"weight {name} is FP8 without its scales {name}{SCALE}; fetch the files again")


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
