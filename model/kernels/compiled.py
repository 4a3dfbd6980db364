"""C compiled on the machine at hand, once, into the user's cache folder, and called with tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

import model.kernels as kernels
from errors import waiting

ALIGNMENT = 64  # bytes of a cache line
TYPES = (torch.float32, torch.bfloat16)

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


def compiled(name: str, dtype: torch.dtype, *flags: str) -> Path:
    """The shared library of a C file of this folder, compiled now or found. Raises OSError or CalledProcessError."""
    source, flags = Path(__file__).parent / name, (*flags, *(["-DBF16"] if dtype == torch.bfloat16 else []))
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc or clang) found")
    headers = (header.read_text() for header in sorted(source.parent.glob("*.h")))
    # -march=native: what one processor got from another by a shared home folder might not run.
    facts = (source.read_text(), *headers, compiler, *FLAGS, *flags, platform.platform(), _processor())
    content = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini-deepseek-v3"
    except RuntimeError as error:  # a user without a home
        raise FileNotFoundError(f"no cache folder; set XDG_CACHE_HOME ({error})") from error
    file = folder / f"{source.stem}-{content}.so"
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


def readable(*tensors: Tensor) -> bool:
    """Return whether C can read these: in a CPU's memory (not fake, not distributed), outside of compiled graphs."""
    if torch.compiler.is_compiling():
        return False
    return all(type(x) in (Tensor, nn.Parameter) and kernels.on_cpu(x) and x.dtype in TYPES for x in tensors)


def floats(*shape: int) -> Tensor:
    """Allocate float32 numbers in main memory, whatever torch's default type and device are: C writes there."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def integers(*shape: int) -> Tensor:
    """Allocate int64 numbers likewise."""
    return torch.empty(*shape, dtype=torch.int64, device="cpu")


def scratch(count: int) -> Tensor:
    """Allocate so many float32 numbers from the start of a cache line on."""
    memory = floats(count + ALIGNMENT // 4)
    return memory[-memory.data_ptr() % ALIGNMENT // 4 :]


POINTER, INTEGER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    """Return the fields of a C struct from their types and names, in their order."""
    return [(name, kind) for kind, names in groups for name in names.split()]


class _Address:
    """The type of an argument that is a tensor, or None."""

    @staticmethod
    def from_param(tensor: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


ARGUMENTS = {"t": _Address, "p": POINTER, "l": INTEGER, "i": ctypes.c_int, "f": REAL}


def library(source: str, dtype: torch.dtype, *flags: str, **signatures: str) -> ctypes.CDLL | None:
    """Open a C file of this folder, compiled for numbers of a type, float32 or bfloat16.

    None where it cannot be compiled, or leaves these functions out on this processor.

    Args:
        signatures: of each function, a letter an argument (t: tensor or None, p: array or struct, l: int64, i: int,
            f: float); one that returns an int64 ends in `>`.
    """
    try:
        built = ctypes.CDLL(str(compiled(source, dtype, *flags)))
    except (OSError, subprocess.CalledProcessError):
        return None
    for name, signature in signatures.items():
        if not hasattr(built, name):
            return None
        function = getattr(built, name)
        function.argtypes = [ARGUMENTS[letter] for letter in signature.rstrip(">")]
        function.restype = ctypes.c_int64 if signature.endswith(">") else None
    return built


def opener(source: str, **signatures: str) -> Callable[[torch.dtype], ctypes.CDLL | None]:
    """Return `library` of this file as a function of the type, which opens each once."""
    return lru_cache(lambda dtype: library(source, dtype, **signatures))


@lru_cache
def multiplies(dtype: torch.dtype) -> bool:
    """Return whether products in C are the fastest: AVX-512, for bfloat16 with its products but not AMX's."""
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return torch.cpu._is_avx512_supported()


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keys = ("model name", "flags", "Feat")
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in keys)
