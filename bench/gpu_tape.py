"""A CUDA graph without CUDA: the operations of a step are written down once, and done again on the same tensors.

What a graph would leave out, Python between the operations, is left out here too: a step that rests on a number of the
host's repeats the old one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class HostReads(TorchDispatchMode):
    """Counts what would be a wait for the device: reads of its numbers by the host, of any tensor.

    Copies between host and device, which are waits too, do not exist on a CPU: tests/host_waits.py counts those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._lists = patch.object(Tensor, "tolist", self._listed(Tensor.tolist))  # which no dispatch sees

    def __enter__(self):
        self._lists.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._lists.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += str(function).split(".")[1].startswith(HOST_READS)
        return function(*arguments, **named or {})

    def _listed(self, of):
        def tolist(tensor: Tensor) -> list:
            self.count += 1
            return of(tensor)

        return tolist


class Tape(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph` and, as a context, for `torch.cuda.graph`."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.replays = 0
        self.no_lists = patch.object(Tensor, "tolist", refused)  # which no dispatch sees

    def __enter__(self):
        self.no_lists.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.no_lists.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        name = str(function).split(".")[1]
        if name.startswith(HOST_READS):
            refused(name)
        result = function(*arguments, **named)
        given = {x.untyped_storage()._cdata for x in tree_leaves((arguments, named)) if isinstance(x, Tensor)}
        fresh = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given]
        if fresh or function._schema.is_mutable:  # and not merely a view
            self.calls.append((function, arguments, named, result, bool(fresh)))
        return result

    def replay(self) -> None:
        """Do all of it again; what was new memory then is written again."""
        self.replays += 1
        for function, arguments, named, result, fresh in self.calls:
            again = function(*arguments, **named)
            if fresh:
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


def refused(what: object) -> None:
    """Raise what CUDA would."""
    raise RuntimeError(f"{what if isinstance(what, str) else 'tolist'}: a graph cannot wait for the device")


@contextmanager
def taped_graphs() -> Iterator[list[Tape]]:
    """Let `model.decoding.graph` record tapes, which the list receives, of steps on any device."""
    tapes: list[Tape] = []

    def new() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    with (
        patch("model.decoding.graph.recordable", lambda device: True),
        patch("torch.cuda.graph_pool_handle", lambda: None),
        patch("torch.cuda.CUDAGraph", new),
        patch("torch.cuda.graph", lambda tape, **_: tape),
    ):
        yield tapes
