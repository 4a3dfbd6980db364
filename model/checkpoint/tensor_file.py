"""Safetensors files that go to the disk without a stay in the system's file cache, where it lets them.

A checkpoint would fill that cache with what nobody reads soon. Finding the memory for it is work that the training
beside it waits for: 0.7 to 2 s of a processor for a gigabyte, 0.2 s in this way (docs/lab-log.md, entry 60).
"""

from __future__ import annotations

import errno
import io
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 4096  # bytes: what passes the cache begins and ends at multiples of it, in memory and in the file
ROOM = 1 << 22  # bytes at a time; smaller files take the usual way
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save_file(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """What `safetensors.torch.save_file` does, for contiguous tensors on the CPU. Raises `OSError`."""
    # Larger numbers first, so that each begins at a multiple of its size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    numbers = (tensors[name].detach().view(-1).view(torch.uint8).numpy() for name in order)
    start = len(text).to_bytes(8, "little") + text
    _write(path, len(start) + end, (memoryview(part) for part in (start, *numbers)))


def read_parts(path: Path) -> Iterator[memoryview]:
    """What a file holds, part by part, each valid until the next."""
    with open(path, "rb", buffering=0, opener=_opener(path.stat().st_size)) as file, _room() as room:
        while count := _past_cache(file, lambda: file.readinto(room)):
            yield room[:count]
            if count % BLOCK:  # the end, or near it
                _through_cache(file)


def _write(path: str | Path, size: int, parts: Iterable[memoryview]) -> None:
    held = 0  # bytes in the room
    with open(path, "wb", buffering=0, opener=_opener(size)) as file, _room() as room:
        for part in parts:
            while part:
                count = min(len(part), ROOM - held)
                room[held : held + count] = part[:count]
                part, held = part[count:], held + count
                if held == ROOM:
                    held = _flush(file, room)
        whole = held - held % BLOCK
        _flush(file, room[:whole])
        _through_cache(file)
        _flush(file, room[whole:held])


def _flush(file: io.FileIO, part: memoryview) -> int:
    """Write all of it. Returns how much is left: nothing."""
    while part:
        count = _past_cache(file, lambda part=part: file.write(part))
        part = part[count:]
        if count % BLOCK:
            _through_cache(file)
    return 0


def _room() -> memoryview:
    """ROOM bytes at a page of their own."""
    return memoryview(mmap.mmap(-1, ROOM))


def _opener(size: int) -> Callable[[str, int], int]:
    """How to open a file of this size: past the cache if it is large and the file system knows how to."""

    def opened(path: str, flags: int) -> int:
        if size >= ROOM and hasattr(os, "O_DIRECT"):
            try:
                return os.open(path, flags | os.O_DIRECT, 0o666)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        return os.open(path, flags, 0o666)

    return opened


def _past_cache(file: io.FileIO, work: Callable[[], int]) -> int:
    """Do it; once more the usual way where the file system takes other blocks than these."""
    try:
        return work()
    except OSError as error:
        if error.errno != errno.EINVAL or not _through_cache(file):
            raise
        return work()


def _through_cache(file: io.FileIO) -> bool:
    """From here on the usual way. Returns whether it was not so before."""
    if not hasattr(os, "O_DIRECT"):
        return False
    import fcntl

    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return bool(flags & os.O_DIRECT)
