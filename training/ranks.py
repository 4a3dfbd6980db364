"""One process or many: what a script needs to know of torchrun and torch.distributed."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. Attributes: rank 0 .. world - 1, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str) -> Ranks:
        """Join the peers that torchrun started, if any. `device`: auto, cpu or cuda."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("cpu", "cuda"):
            raise UserError(f"--device {device}: one of auto, cpu, cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no CUDA device, or torch is a CPU build; use --device cpu")
        world = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        place = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
        if device == "cuda":
            torch.cuda.set_device(place)
            torch.set_float32_matmul_precision("high")
        if world > 1 and not dist.is_initialized():
            backend = "nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        return cls(int(os.environ.get("RANK", "0")), world, place)

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print once, not once a process."""
        if self.main:
            print(text, flush=True)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """What every rank holds, in the order of the ranks, on all of them. Tensors must be on the CPU."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def wrap(self, model: nn.Module, some_rest: bool = False) -> nn.Module:
        """The module to call in training: DistributedDataParallel among several ranks.

        some_rest: there are steps in which some parameters, the same on all ranks, take no part.
        """
        if self.world == 1:
            return model
        # Every rank computes the same router bias from summed loads; broadcasting buffers would only cost time.
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            model,
            device_ids=ids,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=some_rest,
        )

    def no_sync(self, module: nn.Module, when: bool) -> AbstractContextManager:
        """Keep gradients local while accumulating."""
        return module.no_sync() if when and self.world > 1 else nullcontext()

    def stop(self) -> None:
        """Leave the group."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
