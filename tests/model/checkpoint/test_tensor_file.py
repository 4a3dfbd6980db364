"""Weights written past the file cache are the file that safetensors would have written."""

from __future__ import annotations

import errno
import os

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from model.checkpoint import tensor_file
from model.checkpoint.tensor_file import BLOCK, ROOM, read_parts, save_file
from training.run.checkpoint import verify, write_manifest

METADATA = {"format": "pt", "base": 'Grüße "1"'}


def tensors(numbers: int) -> dict[str, torch.Tensor]:
    """Of every type a checkpoint has, named against their order in the file, one with `numbers` numbers."""
    torch.manual_seed(0)
    return {
        "a": torch.arange(7, dtype=torch.uint8),
        "b": torch.randn(3, 5).bfloat16(),
        "c": torch.tensor(3.5),
        "d": torch.randn(numbers),
        "e": torch.arange(4, dtype=torch.int64),
        "f": torch.empty(0, 4),
        "g": torch.tensor([True, False]),
    }


# Whole blocks or not, and the place in memory just full, or nearly.
SIZES = [1, 1000, (ROOM - 200) // 4, ROOM // 4, ROOM // 4 + 1, 2 * ROOM // 4 + BLOCK // 4, 3 * ROOM // 4 + 12345]


@pytest.mark.parametrize("numbers", SIZES)
def test_what_safetensors_reads_is_what_was_given(tmp_path, numbers):
    path, given = tmp_path / "x.safetensors", tensors(numbers)
    save_file(given, path, METADATA)
    read = safetensors.torch.load_file(path)
    assert {*read} == {*given}
    for name, tensor in given.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA
    # Every number begins where its type may: readers that map the file rely on it.
    with open(path, "rb") as file:
        assert int.from_bytes(file.read(8), "little") % 8 == 0
    assert b"".join(map(bytes, read_parts(path))) == path.read_bytes()


def test_one_type_gives_the_bytes_of_safetensors_own(tmp_path):
    given = {f"layer.{i}": torch.randn(300, 1000) for i in range(9)}
    save_file(given, tmp_path / "here", {"format": "pt"})
    safetensors.torch.save_file(given, tmp_path / "there", {"format": "pt"})
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


@pytest.fixture
def refuses(monkeypatch):
    """Makes a file system out of this one: which takes no direct file, or no block of ours, or little at a time."""
    true_open, true_write = os.open, tensor_file._past_cache

    def no_file(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return true_open(path, flags, *rest)

    def no_block(file, work):
        import fcntl

        def refused():
            if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return work()

        return true_write(file, refused)

    return {
        "no file": lambda: monkeypatch.setattr(os, "open", no_file),
        "no block": lambda: monkeypatch.setattr(tensor_file, "_past_cache", no_block),
    }


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="only one way to write here")
@pytest.mark.parametrize("kind", ["no file", "no block"])
def test_a_file_system_that_knows_only_the_usual_way(tmp_path, refuses, kind):
    given = tensors(3 * ROOM // 4)
    refuses[kind]()
    save_file(given, tmp_path / "x", METADATA)
    assert b"".join(map(bytes, read_parts(tmp_path / "x"))) == (tmp_path / "x").read_bytes()
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x")["d"], given["d"])


def test_a_disk_that_takes_little_at_a_time(tmp_path, monkeypatch):
    class Slow:
        def __init__(self, file):
            self.file, self.fileno = file, file.fileno

        def write(self, part):
            return self.file.write(part[: 3 * BLOCK + (100 if len(part) > ROOM // 2 else 0)])

    whole = tensor_file._flush
    monkeypatch.setattr(tensor_file, "_flush", lambda file, part: whole(Slow(file), part))
    given = tensors(2 * ROOM // 4)
    save_file(given, tmp_path / "x")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x")["d"], given["d"])


def test_a_full_disk_is_an_error():
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match="No space left"):
            save_file(tensors(ROOM), "/dev/full")


def test_the_manifest_holds_what_is_on_the_disk(tmp_path):
    (tmp_path / "training").mkdir()
    save_file(tensors(ROOM), tmp_path / "x.safetensors")
    write_manifest(tmp_path)
    verify(tmp_path)
