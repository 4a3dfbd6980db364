"""Weights, gradients and optimiser state cut among ranks by FSDP2 (ZeRO, Rajbhandari et al. 2020), experts over ranks.

A layer is gathered when it computes. `--dist.zero 3` gives it back at once; `--dist.zero 1` keeps it, and its gradient,
until the last micro-batch of a step. Every forward pass is a matter of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from model import MiniDeepSeek
from model.expert_parallel import ExpertsOverRanks

Result = TypeVar("Result")


class Sharded(nn.Module):
    """A model in shards, and the outermost of them: embedding, head and norm are whole within `forward`."""

    def __init__(self, model: MiniDeepSeek, mesh: DeviceMesh, zero: int, dtype: torch.dtype) -> None:
        """Cut the model, whose weights become shards in float32. dtype: of what is gathered, and of the products."""
        super().__init__()
        self.model, self.zero = model, zero
        rounded = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        exact = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
        kept = {"reshard_after_forward": zero == 3}
        data, copies = mesh["data"], mesh["edp"]
        for layer in (*model.model.layers, *model.mtp):
            if layer.is_moe:
                if mesh["ep"].size() > 1:
                    layer.mlp.experts = ExpertsOverRanks(layer.mlp.experts, mesh["ep"].get_group())
                fully_shard(layer.mlp.experts, mesh=copies, mp_policy=rounded, **kept)
                fully_shard(layer.mlp.gate, mesh=data, mp_policy=exact, **kept)  # never rounded before it routes
            if hasattr(layer, "shared_head"):  # a part of an MTP layer that is called from outside of it
                fully_shard(layer.shared_head.norm, mesh=data, mp_policy=rounded, **kept)
            fully_shard(layer, mesh=data, mp_policy=rounded, **kept)
        fully_shard(self, mesh=data, mp_policy=rounded, reshard_after_forward=False)
        for unit in self.modules():
            if isinstance(unit, FSDPModule):
                unit.set_gradient_divide_factor(1.0)  # sums, to be divided once by the count of the whole step
                unit.set_force_sum_reduction_for_comms(True)

    def forward(self, work: Callable[[MiniDeepSeek], Result]) -> Result:
        """Call `work` with the model, where it can compute. By all ranks, with as many forward passes on each."""
        return work(self.model)
