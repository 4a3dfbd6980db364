"""What the machine can do: number format, measured matrix-product peak, memory."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

from errors import UserError
from training.parallel.ranks import Ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
