"""What the machine can do: device, number format, measured matrix-product peak, memory."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from errors import UserError
from text.files import peak_memory

MEASURING = 2.0  # seconds at most
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_device(name: str, local: int) -> tuple[torch.device, str]:
    """Return the device of process number `local` of this machine, and why it is that one (nothing where it was given).

    `auto` is CUDA where it can be used. Raises `UserError` for a device that cannot be used here.
    """
    if name == "mps":
        raise UserError("--device mps: Apple's GPUs are not supported; use --device cpu")
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: one of auto, cpu, cuda")
    if name == "cpu":
        return torch.device("cpu"), ""
    fault = _why_not_cuda(local)
    if not fault:
        return torch.device("cuda", local), torch.cuda.get_device_name(local)
    if name == "cuda":
        raise UserError(f"--device cuda: {fault}; use --device cpu")
    return torch.device("cpu"), fault


def _why_not_cuda(local: int) -> str:
    """Compute something there. Returns why that failed, in words; nothing where it did not."""
    if torch.version.hip:
        return "this torch is built for AMD GPUs (ROCm), which are not supported"
    if torch.version.cuda is None:
        return "this torch is built for CPUs only"
    try:
        with warnings.catch_warnings():  # torch warns of a GPU that it has no code for, which then fails below
            warnings.simplefilter("ignore")
            torch.cuda.init()
            if local >= (count := torch.cuda.device_count()):
                raise UserError(
                    f"LOCAL_RANK {local}: this machine has {count} CUDA devices; start one process for each "
                    f"(torchrun --nproc_per_node {count}), or use --device cpu"
                )
            torch.zeros(1, device=torch.device("cuda", local)).add_(1).item()
    except RuntimeError as error:  # no driver, one that is too old, no GPU; torch adds where to find another one
        sentences = re.split(r"(?<=[.?!])\s+", str(error).partition("\n")[0])
        return " ".join(sentence for sentence in sentences if "http" not in sentence).strip(" .")
    return ""


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type of the products; `auto` is bf16 where hardware has it (elsewhere it is emulated)."""
    if name == "auto":
        return torch.bfloat16 if has_bf16_units(device) else torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: one of auto, bf16, fp32 (float16 is not supported: it needs loss scaling)")
    return DTYPES[name]


def has_bf16_units(device: torch.device) -> bool:
    """Return True for CUDA since Ampere, and for CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Compute products in `dtype`; weights and their updates stay in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return tensors of the host on the device; to CUDA the copies go on by themselves, from pinned memory."""
    if device.type != "cuda":
        return dict(tensors)
    return {name: pinned(x).to(device, non_blocking=True) for name, x in tensors.items()}


def pinned(tensor: Tensor) -> Tensor:
    """Return a tensor of the host where the GPU can read it: itself, if it is there already."""
    return tensor if tensor.is_pinned() else tensor.pin_memory()


def set_seed(seed: int, device: torch.device) -> None:
    """Seed the generators of CPU and device; `torch.manual_seed` takes 100 us to look for other kinds of device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def measured_peak(dtype: torch.dtype, device: torch.device, size: int = 2048, patience: float = 0.2) -> float:
    """Return FLOP/s of a plain (size, size) matrix product on all threads: the best, until `patience` seconds pass
    without one that is faster by 1 %, and `MEASURING` at most."""
    size = size * 4 if device.type == "cuda" else size
    numbers = torch.Generator(device).manual_seed(0)  # a run must find the random state as it was left
    a, b = (torch.randn(size, size, generator=numbers, device=device, dtype=dtype) for _ in range(2))
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    a @ b
    best, began = float("inf"), time.perf_counter()
    last = began  # when it was beaten
    while True:
        synchronise()
        start = time.perf_counter()
        a @ b
        synchronise()
        now = time.perf_counter()
        last = now if now - start < 0.99 * best else last
        best = min(best, now - start)
        if now - last >= patience or now - began >= MEASURING:
            return 2 * size**3 / best


@lru_cache
def machine_peak(dtype: torch.dtype, device: torch.device) -> float:
    """`measured_peak`, once a process and before anything else is on the device: memory statistics begin after it."""
    peak = measured_peak(dtype, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return peak


def memory_used(device: torch.device) -> int:
    """Return the most memory used so far, in bytes: allocated on the GPU, or resident in this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
