"""Counts the calls at which the host waits for a CUDA device, each with the line of this project that made it.

For fake tensors of device="cuda" (tests/fake_cuda.py): they have no data, so what the host asks of one is answered with
ones, and what the host would learn the size of is taken to be as large as it can be.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent


class HostWaits(TorchDispatchMode):
    """What was called while it was on. Attributes: waits: "file:line: code (kind)", in order; names: of all kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.names: set[str] = set()

    @contextmanager
    def counting(self) -> Iterator[HostWaits]:
        """Be on, with what the dispatcher does not see."""
        patches = [
            patch.object(FakeTensor, "tolist", lambda x: self._listed(x)),
            patch.object(Tensor, "pin_memory", pinned),
            patch.object(Tensor, "is_pinned", lambda x: getattr(x, "was_pinned", False)),
            patch("torch.cuda.synchronize", lambda *_: self._add("synchronize")),
        ]
        for each in patches:
            each.start()
        try:
            with self:
                yield self
        finally:
            for each in patches:
                each.stop()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        name = str(function).split(".")[1]
        if name == "to":  # as it comes in inference mode
            with self:
                return function.decompose(*arguments, **named)
        self.names.add(name)
        if name in ("_to_copy", "copy_"):
            self._copied(name, arguments, named)
        elif name == "read_ends":  # whose shape alone is known here
            self._add("copy to cpu")
        elif name in ANSWERS and isinstance(arguments[0], FakeTensor) and named.get("output_size") is None:
            if arguments[0].is_cuda:
                self._add(KINDS.get(name, name))
            return ANSWERS[name](*arguments, **named)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_") and has_mask(arguments[1]):
            self._add("index by a mask")
            indices = [part for index in arguments[1] for part in (index if index is None else places(index))]
            return function(arguments[0], indices, *arguments[2:], **named)
        return function(*arguments, **named)

    def _copied(self, name: str, arguments: tuple, named: dict[str, Any]) -> None:
        if name == "copy_":
            to, source = arguments[0].device, arguments[1]
            non_blocking = arguments[2] if len(arguments) > 2 else named.get("non_blocking")
        else:
            source, non_blocking = arguments[0], named.get("non_blocking")
            to = torch.device(named.get("device") or source.device)
        if to.type == source.device.type:
            return
        if not non_blocking:
            self._add(f"copy to {to.type}")
        elif to.type == "cuda" and not getattr(source, "was_pinned", False):
            self._add("copy of memory that is not pinned")

    def _listed(self, tensor: Tensor) -> list[int]:
        if tensor.is_cuda:
            self._add("tolist")
        return [1] * tensor.numel()

    def _add(self, kind: str) -> None:
        stack = reversed(traceback.extract_stack())
        here = next(frame for frame in stack if is_ours(frame.filename))
        self.waits.append(f"{Path(here.filename).relative_to(ROOT)}:{here.lineno}: {here.line} ({kind})")


def is_ours(file: str) -> bool:
    return file.startswith(f"{ROOT}/") and "site-packages" not in file and file != __file__


def pinned(tensor: Tensor) -> Tensor:
    """What stands for the copy in pinned memory: only a copy from there to the device goes on by itself."""
    copied = tensor.clone()
    copied.was_pinned = True
    return copied


def has_mask(indices: list[Tensor | None]) -> bool:
    return any(index is not None and index.is_cuda and index.dtype in (torch.bool, torch.uint8) for index in indices)


def places(index: Tensor) -> list[Tensor]:
    """An index of integers: of a mask one for each axis of it, as if all of it were chosen."""
    if index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return [torch.zeros(index.numel(), dtype=torch.long, device=index.device) for _ in range(index.dim())]


def scalar(x: Tensor) -> bool | int | float:
    return True if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1


def flat_zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.numel(), dtype=torch.long, device=x.device)


KINDS = {"_local_scalar_dense": "item", "_unique2": "unique"}
# Of what waits, unless `repeat_interleave` is given its `output_size`.
ANSWERS: dict[str, Callable[..., object]] = {
    "_local_scalar_dense": scalar,
    "nonzero": lambda x: torch.zeros(x.numel(), x.dim(), dtype=torch.long, device=x.device),
    "masked_select": lambda x, _: x.flatten(),
    "_unique2": lambda x, *_, **__: (x.flatten(), torch.zeros_like(x, dtype=torch.long), flat_zeros(x)),
    "bincount": lambda x, *_, **__: flat_zeros(x),
    "repeat_interleave": lambda x, *_, **__: flat_zeros(x),
    "equal": lambda *_: True,
}
