"""The model on all ranks, replicated by DistributedDataParallel; that all hold the same: rank_checks.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model import MiniDeepSeek
from training.losses import Batch, Loss, Metric
from training.parallel.ranks import Ranks

Result = TypeVar("Result")


def replicate(model: nn.Module, ranks: Ranks, gradients: str = "fp32") -> nn.Module:
    """Return the module to call in training: every rank holds all weights, gradients are averaged over ranks.

    gradients: the type in which they are exchanged.

    Every parameter that requires a gradient must get one in each step. `find_unused_parameters` is no way around:
    it looks at what `forward` returns, and the output head is used after it, by the loss.
    """
    if ranks.world == 1:
        return model
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    # Every rank computes the same router bias from summed loads; sending buffers would only cost time.
    # torch 2.11 has `broadcast_buffers` alone, which leaves them out at the start as well: ranks begin equal anyway.
    known = signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    copy = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **{name: False})
    if gradients == "bf16":
        copy.register_comm_hook(None, average_in_bf16)
    return copy


def average_in_bf16(_, bucket):  # DDP reads annotations, and refuses those that are strings
    """Average a bucket of gradients over ranks, rounded on the way. torch's own hook for it asks for CUDA."""
    gradients = bucket.buffer()
    rounded = gradients.bfloat16().div_(dist.get_world_size())
    return dist.all_reduce(rounded, async_op=True).get_future().then(lambda done: gradients.copy_(done.value()[0]))


class Replicated:
    """The model on every rank, or on the only one.

    Attributes: module: what is called in training; averaged_over: ranks over which gradients are averaged, and not
        summed; pipeline: None, for all layers are on each rank.
    """

    pipeline = None

    def __init__(self, model: MiniDeepSeek, ranks: Ranks, gradients: str = "fp32") -> None:
        self._model, self.module = model, replicate(model, ranks, gradients)
        self.averaged_over, self._counts = ranks.world, ranks.main

    def accumulating(self, more: bool) -> AbstractContextManager:
        """Keep gradients local while more micro-batches of the step follow."""
        return self.module.no_sync() if more and self.averaged_over > 1 else nullcontext()

    def compute(self, loss: Loss, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Metric]]:
        """Return the loss of a micro-batch."""
        return loss(self.module, batch)

    def measure(self, work: Callable[[MiniDeepSeek], Result]) -> Result:
        """Return what `work`, without gradients, makes of the model."""
        return work(self._model)

    def gradients(self) -> list[torch.Tensor]:
        """Return those of all weights that have one."""
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def squares(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Return the squared norm on the main rank, zero elsewhere: all have the same, and no bit may part them."""
        squares = torch.nn.utils.get_total_norm(gradients).double().square()
        return squares if self._counts else torch.zeros_like(squares)
