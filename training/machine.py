"""What the machine can do: device, number format, measured matrix-product peak, memory."""

from __future__ import annotations

import re
import resource
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from errors import UserError

if TYPE_CHECKING:
    from training.parallel.ranks import Ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_device(name: str, local: int) -> tuple[torch.device, str]:
    """The device of process number `local` of this machine, and why it is that one (nothing where it was given).

    `auto` is CUDA where it can be used. Raises `UserError` for a device that cannot be used here.
    """
    if name == "mps":
        raise UserError("--device mps: Apple's GPUs are not supported; use --device cpu")
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: one of auto, cpu, cuda")
    if name == "cpu":
        return torch.device("cpu"), ""
    fault = why_not_cuda()
    if not fault:
        count = torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"LOCAL_RANK {local}: this machine has {count} CUDA devices; start one process for each "
                f"(torchrun --nproc_per_node {count}), or use --device cpu"
            )
        fault = why_no_kernels(local)
    if not fault:
        return torch.device("cuda", local), torch.cuda.get_device_name(local)
    if name == "cuda":
        raise UserError(f"--device cuda: {fault}; use --device cpu")
    return torch.device("cpu"), fault


def why_not_cuda() -> str:
    """Why this process can use no CUDA device, in words; nothing where it can."""
    if torch.version.hip:
        return "this torch is built for AMD GPUs (ROCm), which are not supported"
    if torch.version.cuda is None:
        return "this torch is built for CPUs only"
    try:
        with warnings.catch_warnings():  # torch warns of a GPU that it has no code for: see `why_no_kernels`
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except RuntimeError as error:  # no driver, one that is too old, no GPU; torch adds where to find another one
        sentences = re.split(r"(?<=[.?!])\s+", str(error))
        return " ".join(sentence for sentence in sentences if "http" not in sentence).strip(" .")
    return ""


def why_no_kernels(index: int) -> str:
    """Why torch cannot run on a CUDA device for which it was not compiled, in words; nothing where it can."""
    capability, built = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if not built or any(runs_on(architecture, capability) for architecture in built):
        return ""
    place = f"{torch.cuda.get_device_name(index)} (sm_{capability[0]}{capability[1]})"
    return f"this torch has no code for {place}, only for {', '.join(built)}"


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture, such as sm_90a or compute_90, runs on a device of that compute capability.

    Machine code (sm) runs on its own major version from its minor version on; PTX (compute) on all later ones too. With
    the suffix `a` it runs on that very version only, with `f` within its major version (CUDA C++ Programming Guide).
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if found is None:
        return False
    version = int(found[2]), int(found[3])
    if found[4] == "a":
        return version == capability
    forward = found[1] == "compute" and not found[4]
    return version <= capability and (forward or version[0] == capability[0])


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the products: bf16 or fp32; `auto` takes bf16 where hardware has it (elsewhere it is emulated)."""
    if name == "auto":
        return torch.bfloat16 if has_bf16_units(device) else torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: one of auto, bf16, fp32 (float16 is not supported: it needs loss scaling)")
    return DTYPES[name]


def has_bf16_units(device: torch.device) -> bool:
    """CUDA since Ampere, and CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Products in `dtype`, weights and their updates in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def set_seed(seed: int, device: torch.device) -> None:
    """Seed the generators of CPU and device; `torch.manual_seed` takes 100 us to look for other kinds of device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def measured_peak(dtype: torch.dtype, device: torch.device, size: int = 2048, seconds: float = 2.0) -> float:
    """FLOP/s of a plain (size, size) matrix product on all threads, best of those that `seconds` have room for."""
    size = size * 4 if device.type == "cuda" else size
    # Numbers of its own: a run must find the random state as it was left.
    numbers = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=numbers, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    a @ b
    while best == float("inf") or time.perf_counter() < end:  # once at least, however slow the machine
        _synchronise(device)
        start = time.perf_counter()
        a @ b
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@lru_cache
def machine_peak(dtype: torch.dtype, device: torch.device) -> float:
    """`measured_peak`, once a process and before anything else is on the device: memory statistics begin after it."""
    peak = measured_peak(dtype, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return peak


class Peak:
    """The FLOP/s that all ranks' matrix products may reach, which MFU is a share of.

    A neighbour on the machine can make what was measured too low: a step that goes beyond it raises it.
    """

    def __init__(self, dtype: torch.dtype, ranks: Ranks) -> None:
        """As the main rank measured it; infinite on the others."""
        self._ranks = ranks
        self.rate = machine_peak(dtype, ranks.device) * ranks.world if ranks.main else float("inf")

    def share(self, rate: float) -> float:
        """Of the peak, what a step reached at `rate` FLOP/s; at most 1."""
        if rate > self.rate:
            self._ranks.say(
                f"peak       a step at {rate / 1e9:,.0f} GFLOP/s was faster than the matrix products measured at the "
                f"start ({self.rate / 1e9:,.0f}): MFU is a share of that from now on"
            )
            self.rate = rate
        return rate / self.rate


def measured_bandwidth(device: torch.device, megabytes: int = 1024, times: int = 5) -> float:
    """Bytes a second that the GPU, or all threads, read from memory, best of several: what decoding is measured by."""
    numbers = torch.ones(megabytes * 2**20 // 4, device=device)
    best = float("inf")
    for _ in range(times):
        _synchronise(device)
        start = time.perf_counter()
        numbers.sum()
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return numbers.numel() * 4 / best


def peak_memory(device: torch.device) -> int:
    """The most memory used so far, in bytes: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
