"""C compiled on the machine at hand, once, into the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from errors import waiting

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


def compiled(source: Path, *flags: str) -> Path:
    """The shared library of a C file, compiled now or found compiled. Raises OSError or CalledProcessError."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc or clang) found")
    headers = (header.read_text() for header in sorted(source.parent.glob("*.h")))
    # -march=native: what one processor got from another by a shared home folder might not run.
    facts = (source.read_text(), *headers, compiler, *FLAGS, *flags, platform.platform(), _processor())
    name = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini-deepseek-v3"
    except RuntimeError as error:  # a user without a home
        raise FileNotFoundError(f"no cache folder; set XDG_CACHE_HOME ({error})") from error
    file = folder / f"{source.stem}-{name}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(handle)
        try:
            command = [*shlex.split(compiler), *FLAGS, *flags, "-o", partial, str(source), "-lm"]
            with waiting(f"compiling {source.name} for this processor, once"):
                subprocess.run(command, check=True, capture_output=True, text=True)
            with open(partial, "rb") as built:
                os.fsync(built.fileno())  # or the name may outlive what is in it when the power fails
            os.replace(partial, file)
        finally:
            Path(partial).unlink(missing_ok=True)
    return file


def floats(*shape: int) -> Tensor:
    """Room for float32 numbers in main memory, whatever torch's default type and device are: C writes there."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def integers(*shape: int) -> Tensor:
    """The same for int64."""
    return torch.empty(*shape, dtype=torch.int64, device="cpu")


@lru_cache
def opened(source: Path, dtype: torch.dtype) -> ctypes.CDLL | None:
    """A C file compiled for numbers of this type, float32 or bfloat16; None where that cannot be."""
    try:
        return ctypes.CDLL(str(compiled(source, *(["-DBF16"] if dtype == torch.bfloat16 else []))))
    except (OSError, subprocess.CalledProcessError):
        return None


@lru_cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether products in C are the quick way: AVX-512, for bfloat16 with its products, unless there is AMX.

    AMX multiplies several times faster, and only libraries use it.
    """
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_avx512_supported()


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(
        next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags", "Feat")
    )
