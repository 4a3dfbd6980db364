"""Weights, gradients and optimiser state cut among ranks by FSDP2 (ZeRO, Rajbhandari et al. 2020), experts over ranks.

A layer is gathered when it computes. `--dist.zero 3` gives it back at once; `--dist.zero 1` keeps it, and its gradient,
until the last micro-batch of a step. Every forward pass is a matter of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import MiniDeepSeek
from model.expert_parallel import ExpertsOverRanks
from training.losses import Batch, Loss, Metric
from training.parallel.mesh import Mesh, check_mesh
from training.parallel.ranks import Ranks
from training.parallel.replication import check_facts, facts
from training.run.resume import WholeModel, same_shape
from training.settings import StageSettings

Result = TypeVar("Result")


def shard(
    settings: StageSettings, ranks: Ranks, model: MiniDeepSeek, dtype: torch.dtype, run: dict[str, Any]
) -> Sharded:
    """Cut a model among the ranks as `--dist.zero` and `--dist.ep` say, once all are found to have the same.

    dtype: of the products; run: see `facts`. Shards go to the device, the whole does not.
    """
    check_mesh(settings, ranks.world, model.config.n_routed_experts)
    check_facts(ranks, facts(settings, run, model))
    return Sharded(model, Mesh.of(settings, ranks), settings.dist.zero, dtype)


class Sharded(nn.Module):
    """A model in shards, and the outermost of them: embedding, head and norm are whole within `forward`.

    Attributes: as of `Replicated`; shards: the weights of this rank.
    """

    averaged_over, disjoint = 1, True

    def __init__(self, model: MiniDeepSeek, mesh: Mesh, zero: int, dtype: torch.dtype) -> None:
        """Cut the model, whose weights become shards in float32. dtype: of what is gathered, and of the products."""
        super().__init__()
        self.model, self._keeps = model, zero < 3
        rounded = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        exact = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
        given_back = {"reshard_after_forward": zero == 3}
        for layer in (*model.model.layers, *model.mtp):
            if layer.is_moe:
                if mesh.ep.size() > 1:
                    layer.mlp.experts = ExpertsOverRanks(layer.mlp.experts, mesh.ep.get_group())
                fully_shard(layer.mlp.experts, mesh=mesh.copies, mp_policy=rounded, **given_back)
                fully_shard(layer.mlp.gate, mesh=mesh.data, mp_policy=exact, **given_back)  # not rounded to route by
            if hasattr(layer, "shared_head"):  # called from outside of its layer
                fully_shard(layer.shared_head.norm, mesh=mesh.data, mp_policy=rounded, **given_back)
            fully_shard(layer, mesh=mesh.data, mp_policy=rounded, **given_back)
        fully_shard(self, mesh=mesh.data, mp_policy=rounded, reshard_after_forward=False)
        self._units = [unit for unit in self.modules() if isinstance(unit, FSDPModule)]
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)  # sums, to be divided once by the count of the whole step
            unit.set_force_sum_reduction_for_comms(True)
        self.shards = Shards(model, mesh)

    def forward(self, work: Callable[[MiniDeepSeek], Result]) -> Result:
        """Call `work` with the model, where it can compute: on all ranks, with as many forward passes on each."""
        return work(self.model)

    def accumulating(self, more: bool) -> AbstractContextManager:
        """With ZeRO-1 gradients and whole weights stay local while more micro-batches of the step follow."""
        self.set_requires_gradient_sync(not (more and self._keeps))
        self.set_reshard_after_backward(not (more and self._keeps))
        return nullcontext()

    def compute(self, loss: Loss, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Metric]]:
        """Return the loss of a micro-batch."""
        return self(lambda model: loss(model, batch))

    def measure(self, work: Callable[[MiniDeepSeek], Result]) -> Result:
        """Return what `work`, without gradients, makes of the model. After it every rank has its shards alone."""
        with torch.no_grad():
            result = self(work)
        for unit in self._units:
            unit.reshard()
        return result

    def gradients(self) -> list[Tensor]:
        """Return those of the shards."""
        return self.shards.gradients()


class Shards:
    """This rank's share of each weight, for optimiser and checkpoints: ordinary tensors in the memory of FSDP2's."""

    def __init__(self, model: MiniDeepSeek, mesh: Mesh) -> None:
        self._mesh = mesh
        self._whole: dict[str, DTensor] = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        self._mine = {name: nn.Parameter(p.detach().to_local(), p.requires_grad) for name, p in self._whole.items()}

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Yield them by the names of the weights."""
        return self._mine.items()

    def gradients(self) -> list[Tensor]:
        """Give each its gradient. Returns these."""
        for name, p in self._whole.items():
            self._mine[name].grad = None if p.grad is None else p.grad.to_local()
            p.grad = None
        return [p.grad for p in self._mine.values() if p.grad is not None]

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return whole ones on the main rank's host, nothing on the others; one after the other, by all ranks together.

        tensors: the state dict of the model, or of these shards, named `weight` or `weight|quantity`.
        """
        whole = {}
        for name, tensor in tensors.items():
            found = self._join(name.partition("|")[0], tensor)
            if dist.get_rank() == 0:
                whole[name] = found.cpu()
        return whole

    def _join(self, weight: str, tensor: Tensor) -> Tensor:
        p = self._whole.get(weight)
        if not isinstance(tensor, DTensor) and (p is None or not tensor.dim()):
            return tensor.clone()  # a buffer, or a count of steps
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
        full = tensor.detach().full_tensor()
        if not self._is_spread(weight):
            return full
        parts = [torch.empty_like(full) for _ in range(self._mesh.ep.size())]
        dist.all_gather(parts, full, group=self._mesh.ep.get_group())
        return torch.cat(parts)

    def cut(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of whole ones, named as in `gather`."""
        return {name: self._share(name.partition("|")[0], tensor) for name, tensor in tensors.items()}

    def _share(self, weight: str, tensor: Tensor) -> Tensor:
        if weight not in self._whole or not tensor.dim():
            return tensor
        meshes = [self._mesh.ep, self._mesh.copies] if self._is_spread(weight) else [self._whole[weight].device_mesh]
        for mesh in meshes:
            rows = tensor.chunk(mesh.size())
            tensor = rows[mesh.get_local_rank()] if mesh.get_local_rank() < len(rows) else tensor[:0]
        return tensor

    def _is_spread(self, weight: str) -> bool:
        return self._mesh.ep.size() > 1 and ".mlp.experts." in weight

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take this rank's share of the weights of a whole model's state dict."""
        places = self._mine | {name: buffer for name, buffer in self._buffers.items() if name in state}
        for name, share in self.cut({name: state[name] for name in places}).items():
            places[name].copy_(share)


class ShardedModel(WholeModel):
    """The weights of a checkpoint, whole as those of one process."""

    def __init__(self, sharded: Sharded) -> None:
        super().__init__(sharded.model)
        self.shards = sharded.shards

    def tensors(self) -> dict[str, Tensor]:
        return self.shards.gather(self.model.state_dict())

    def load(self, folder: Path) -> None:
        saved = MiniDeepSeek.from_pretrained(folder)
        same_shape(folder, saved.config, self.model.config)
        self.shards.load(saved.state_dict())
