"""Where a benchmark computes: its device, a clock that waits for it, and the memory that it took."""

from __future__ import annotations

import argparse
import time

import torch

from training.machine import peak_memory
from training.parallel.ranks import Ranks


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option `--device`, as every training script has it."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def device_of(name: str) -> torch.device:
    """auto takes CUDA where there is some; asks for it in vain with `UserError`."""
    return Ranks.start(name).device


def now(device: torch.device) -> float:
    """Seconds, once all that the device was given to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_mb(device: torch.device) -> float:
    """The most memory this process has used, in MB of 2^20 bytes: allocated on the GPU, or resident."""
    return peak_memory(device) / 2**20
