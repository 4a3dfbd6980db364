"""Weights, gradients and optimiser state cut among ranks by FSDP2 (ZeRO, Rajbhandari et al. 2020), experts over ranks.

A layer is gathered when it computes. `--dist.zero 3` gives it back at once; `--dist.zero 1` keeps it, and its gradient,
until the last micro-batch of a step. Every forward pass is a matter of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import MiniDeepSeek
from model.expert_parallel import over_ranks
from model.pipeline import Elsewhere
from training.losses import Batch, Loss, Metric
from training.optim.ema import MARK
from training.parallel.initial import Deferred
from training.parallel.mesh import Mesh
from training.parallel.mesh_checks import check_mesh, check_stages
from training.parallel.rank_checks import check_facts, facts, listed
from training.parallel.ranks import Ranks
from training.parallel.schedule import Ends, Measured, Piped, Pipeline, Seed
from training.run.checkpoint import DATA
from training.settings import StageSettings

Result = TypeVar("Result")
EMBEDDING = "model.embed_tokens.weight"
MEANS = f"{DATA}{MARK}"


def shard(
    settings: StageSettings, ranks: Ranks, model: MiniDeepSeek, dtype: torch.dtype, run: dict[str, Any]
) -> Sharded:
    """Cut a model among the ranks as `--dist.zero`, `ep` and `pp` say, once all are found to have the same.

    dtype: of the products; run: see `facts`. Shards go to the device, the whole does not.
    """
    config = replace(model.config, num_nextn_predict_layers=len(model.mtp))  # an adapter's model has left them out
    ranks.on_main(lambda: check_mesh(settings, ranks.world, config))
    if settings.dist.pp > 1:
        ranks.on_main(lambda: check_stages(model, settings.dist))
    check_facts(ranks, facts(settings, run, model))
    mesh = Mesh.of(settings, ranks)
    pipeline = Pipeline(model, mesh, settings.dist, dtype) if settings.dist.pp > 1 else None
    # Numbers in FP8 are made of the whole weight on one process; rounded to bfloat16 on the way they would be others.
    sharded = Sharded(model, mesh, settings.dist.zero, torch.float32 if settings.fp8 else dtype, pipeline)
    return _filled(ranks, sharded, model)


def shard_frozen(settings: StageSettings, ranks: Ranks, model: Deferred, dtype: torch.dtype) -> Sharded:
    """Cut a model that is asked but never trained. A layer of it is whole only while it computes."""
    ranks.on_main(lambda: check_mesh(settings, ranks.world, model.config))
    return _filled(ranks, Sharded(model.requires_grad_(False).eval(), Mesh.of(settings, ranks), 3, dtype), model)


def _filled(ranks: Ranks, sharded: Sharded, model: MiniDeepSeek) -> Sharded:
    """Put the first weights in, of which all ranks must find the same."""
    if isinstance(model, Deferred):
        check_facts(ranks, {"weights": dict(zip(*listed(model.put_in(sharded.shards)), strict=True))})
    return sharded


class Sharded(nn.Module):
    """A model in shards, and the outermost of them: embedding, head and norm are whole within `forward`.

    Attributes: as of `Replicated`; shards: the weights of this rank; pipeline: where layers are on other ranks.
    """

    averaged_over = 1

    def __init__(
        self, model: MiniDeepSeek, mesh: Mesh, zero: int, dtype: torch.dtype, pipeline: Pipeline | None = None
    ) -> None:
        """Cut the model, whose weights become shards in float32. dtype: of what is gathered, and of the products."""
        super().__init__()
        self.pipeline, self._keeps, self._met = pipeline, zero < 3, False
        self._whole = (Piped(pipeline) if pipeline else model,)  # not a part of this module: it may be on other ranks
        self.parts = nn.ModuleList(pipeline.stages.values() if pipeline else [model])
        rounded = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        exact = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
        given_back = {"reshard_after_forward": zero == 3}
        for layer in (layer for part in self.parts for layer in (*part.model.layers, *part.mtp)):
            if isinstance(layer, Elsewhere):
                continue
            if layer.is_moe:
                if mesh.ep.size() > 1:
                    layer.mlp.experts = over_ranks(layer.mlp.experts, mesh.ep.get_group())
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
        if any(p.is_meta for p in self.parameters()):
            self._apply(lambda t: torch.empty_like(t, device=mesh.data.device_type) if t.is_meta else t)
        self.shards = Shards(self.parts, mesh, pipeline and pipeline.ends)
        if pipeline:
            pipeline.within = lambda work: self(lambda _: work())

    @property
    def model(self) -> MiniDeepSeek:
        """The whole, to be called on all ranks together; in a pipeline without gradients."""
        return self._whole[0]

    def forward(self, work: Callable[[MiniDeepSeek], Result]) -> Result:
        """Call `work` with the model, where it can compute: on all ranks, with as many forward passes on each."""
        return work(self.model)

    def accumulating(self, more: bool) -> AbstractContextManager:
        """With ZeRO-1 gradients and whole weights stay local while more micro-batches of the step follow."""
        self._exchanges(not (more and self._keeps))
        return nullcontext()

    def _exchanges(self, now: bool) -> None:
        if not self._met:  # FSDP2 looks for gradients of a unit that has no part in a step, where it knows only shards
            for unit in self._units:
                unit.unshard()
                unit.reshard()
            self._met = True
        self.set_requires_gradient_sync(now)
        self.set_reshard_after_backward(now)

    def compute(self, loss: Loss, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Metric]]:
        """Return the loss of a micro-batch."""
        return self(lambda model: loss(model, batch))

    def compute_all(self, loss: Loss, batches: Sequence[Batch], nominal: int, seed: Seed) -> list[Measured]:
        """Do forward and backward passes of a step in a pipeline: `Pipeline.run`."""
        self._exchanges(False)
        measured = self.pipeline.run(loss, batches, nominal, seed)
        self._exchanges(True)
        # At the end of a backward pass, of nothing here, FSDP2 exchanges what has been accumulated.
        self(lambda _: torch.zeros((), device=batches[0]["input_ids"].device, requires_grad=True) * 0).backward()
        return measured

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

    def squares(self, gradients: list[Tensor]) -> Tensor:
        """Return this rank's part of the squared norm, which is summed over ranks."""
        return self.shards.squares(gradients)


class Shards:
    """This rank's share of each weight, for optimiser and checkpoints: ordinary tensors in the memory of FSDP2's."""

    def __init__(self, parts: Iterable[nn.Module], mesh: Mesh, ends: Ends | None = None) -> None:
        """parts: of the model, with names as in the whole; ends: where another rank trains the embedding too."""
        self._mesh, self._ends, self._parts = mesh, ends, list(parts)
        self._whole: dict[str, DTensor] = {name: p for part in self._parts for name, p in part.named_parameters()}
        self._buffers = {name: buffer for part in self._parts for name, buffer in part.named_buffers()}
        self._mine = {name: nn.Parameter(p.detach().to_local(), p.requires_grad) for name, p in self._whole.items()}

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Yield them by the names of the weights."""
        return self._mine.items()

    def gradients(self) -> list[Tensor]:
        """Give each its gradient. Returns these."""
        for name, p in self._whole.items():
            self._mine[name].grad = None if p.grad is None else p.grad.to_local()
            p.grad = None
        if self._ends:
            embedding = self._mine[EMBEDDING]
            embedding.grad = torch.zeros_like(embedding) if embedding.grad is None else embedding.grad
            dist.all_reduce(embedding.grad, group=self._ends.group)
        return [p.grad for p in self._mine.values() if p.grad is not None]

    def squares(self, gradients: list[Tensor]) -> Tensor:
        """Return the sum of their squares, float64, without those that another rank counts."""
        again = self._mine[EMBEDDING].grad if self._ends and self._ends.is_last else None
        return torch.nn.utils.get_total_norm([grad for grad in gradients if grad is not again]).double().square()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the state dicts of the parts hold."""
        return {name: tensor for part in self._parts for name, tensor in part.state_dict().items()}

    @property
    def number(self) -> tuple[int, int]:
        """Return which of how many ranks this is, from 1."""
        return dist.get_rank() + 1, dist.get_world_size()

    def gather(self, here: dict[str, Tensor], writers: dict[str, int]) -> dict[str, Tensor]:
        """Return whole ones on the host of the rank that writes each, one after the other.

        here: weights and buffers as in `state_dict()`; writers: by name, of those of all stages, in one order on all
        ranks, which call this together.
        """
        whole, pp = {}, self._mesh.pp
        described = {name: (self._full_shape(name, tensor), tensor.dtype) for name, tensor in here.items()}
        everywhere: list[Any] = [described]
        if pp.size() > 1:
            everywhere = [None] * pp.size()
            dist.all_gather_object(everywhere, described, pp.get_group())
        rank, width = dist.get_rank(), self._mesh.data.size()
        for name, writer in writers.items():
            stage = next(stage for stage, names in enumerate(everywhere) if name in names)
            found = self._join(name, here[name]) if stage == pp.get_local_rank() else None
            source = stage * width + writer % width  # ranks of a stage are neighbours
            if source != writer and rank == source:
                dist.send(found.contiguous(), writer, pp.get_group())
            elif source != writer and rank == writer:
                shape, dtype = everywhere[stage][name]
                found = torch.empty(shape, dtype=dtype, device=self._mesh.data.device_type)
                dist.recv(found, source, pp.get_group())
            if rank == writer:
                whole[name] = found.cpu()
        return whole

    @torch.no_grad()
    def copy_to(self, model: MiniDeepSeek) -> None:
        """Put the whole weights and buffers into a model of every rank, in the types that they have there."""
        for name, mine in (*model.named_parameters(), *model.named_buffers()):
            tensor = self._whole[name] if name in self._whole else self._buffers[name]
            mine.copy_(self._join(name, tensor))

    def _join(self, weight: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.clone()  # a buffer
        full = tensor.detach().full_tensor()
        if not self._is_spread(weight):
            return full
        parts = [torch.empty_like(full) for _ in range(self._mesh.ep.size())]
        dist.all_gather(parts, full, group=self._mesh.ep.get_group())
        return torch.cat(parts)

    def _full_shape(self, weight: str, tensor: Tensor) -> torch.Size:
        """Return that of what `_join` returns."""
        parts = self._mesh.ep.size() if isinstance(tensor, DTensor) and self._is_spread(weight) else 1
        return tensor.shape if parts == 1 else torch.Size((tensor.shape[0] * parts, *tensor.shape[1:]))

    def _is_here(self, weight: str) -> bool:
        return self._mesh.pp.size() == 1 or weight in self._mine or weight in self._buffers

    def rows(self, weight: str) -> slice:
        """Return which rows of a whole weight this rank has, of its first axis; all of a buffer."""
        if weight not in self._whole:
            return slice(None)
        p, first = self._whole[weight], 0
        meshes = [self._mesh.ep, self._mesh.copies] if self._is_spread(weight) else [p.device_mesh]
        count = p.shape[0] * (self._mesh.ep.size() if self._is_spread(weight) else 1)
        for mesh in meshes:  # each cuts what the one before has left, as torch.chunk does
            part = -(-count // mesh.size())
            begin = min(mesh.get_local_rank() * part, count)
            first, count = first + begin, min(part, count - begin)
        return slice(first, first + count)

    def _is_spread(self, weight: str) -> bool:
        return self._mesh.ep.size() > 1 and ".mlp.experts." in weight

    def places(self) -> dict[str, Tensor]:
        """Return where the weights of a model's state dict are, this rank's share of each."""
        buffers = {name: buffer for name, buffer in self._buffers.items() if name in self.state_dict()}
        return {name: p.detach() for name, p in self._mine.items()} | buffers

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take this rank's share of the weights of a whole model's state dict, or of some of them."""
        places = self._mine | self._buffers
        for name in state.keys() & places.keys():
            places[name].copy_(state[name][self.rows(name)] if state[name].dim() else state[name])

    def state_rows(self, name: str) -> slice | None:
        """Return which rows this rank has of a tensor in a checkpoint's training state; None where it has no part.

        name: `weight|quantity` of the optimiser, or of a data set, or of the mean.
        """
        weight = name.removeprefix(MEANS) if name.startswith(MEANS) else name.partition("|")[0]
        if name.startswith(DATA) and not name.startswith(MEANS):
            return slice(None)
        return self.rows(weight) if self._is_here(weight) else None

    def writes(self, name: str, tensor: Tensor) -> bool:
        """Return whether this rank writes what it has of such a tensor: what others have too, one of them writes."""
        if name.startswith(DATA) and not name.startswith(MEANS):
            return dist.get_rank() == 0
        if self._ends and self._ends.is_last and EMBEDDING in name:
            return False
        return bool(tensor.dim()) or self._mesh.data.get_local_rank() == 0
