"""The layers over ranks: stages of the model run by the schedules of torch.distributed.pipelining (section 3.2.1).

A stage passes on the state and the sums of the balance loss, and gets their gradients back; each rank reads the rows of
its micro-batches itself. 1F1B gives each rank a stage. ZB-V (Qi et al. 2023) and DualPipeV fold 2 pp stages into a V:
the first rank has the first and the last, and with them embedding and head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torch.utils._pytree import tree_map

from model import MiniDeepSeek
from model.pipeline import Stage, WeightGradients
from model.transformer import Output
from training.losses import INPUTS, Batch, Loss, Metric
from training.machine import autocast
from training.parallel.placement import stage_layers

if TYPE_CHECKING:
    from training.parallel.dist_settings import ShardSettings
    from training.parallel.mesh import Mesh

CLASSES = {"1f1b": "1F1B", "zbv": "ZBVZeroBubble", "dualpipev": "DualPipeV"}
Work = Callable[[], Any]
Seed = Callable[[int, int], None]  # called with micro-batch and stage before a forward pass, for what is drawn there


class Measured(NamedTuple):
    """What the last stage found in one micro-batch."""

    loss: Tensor
    count: Tensor
    metrics: dict[str, Metric]


class Ends(NamedTuple):
    """Where the embedding is on two ranks. Attributes: group: the two; is_last: whether this one has the last stage."""

    group: dist.ProcessGroup
    is_last: bool


class Pipeline:
    """The stages of one rank. Attributes: stages: by their number, of `count`; whole: the model that they are cut from.

    `within`, called with work that a stage is to do, is set by what holds the stages' weights. ends: see `Ends`; None
    where this rank has no embedding, or nobody else has it.
    """

    def __init__(self, whole: MiniDeepSeek, mesh: Mesh, settings: ShardSettings, dtype: torch.dtype) -> None:
        """Cut the whole. What is left of it, the parts on other ranks, no longer has any memory."""
        self._group, self._rank = mesh.pp.get_group(), mesh.pp.get_local_rank()
        self._kind, self._dtype, self.whole = settings.schedule, dtype, whole
        folded, self.count = settings.schedule in settings.FOLDED, settings.stages
        mine = (self._rank, self.count - 1 - self._rank) if folded else (self._rank,)
        self._rank_of = [min(stage, self.count - 1 - stage) if folded else stage for stage in range(self.count)]
        layers = stage_layers(whole.config.num_hidden_layers, len(whole.mtp), self.count)
        self.stages = {
            stage: Stage(whole, layers[stage], stage == 0, stage == self.count - 1) for stage in sorted(mine)
        }
        self.last = self.stages.get(self.count - 1)
        self.within: Callable[[Work], Any] = lambda work: work()
        self._later = {stage: WeightGradients(module) for stage, module in self.stages.items() if folded}
        self._turns = {stage: _Turn(self, stage) for stage in self.stages}
        self._schedule, self._shape = None, None
        self.ends = self._ends(mesh, settings.pp, folded)
        kept = {id(p) for module in self.stages.values() for p in (*module.parameters(), *module.buffers())}
        for part in whole.modules():
            own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
            if own and not any(id(tensor) in kept for tensor in own):
                part.to("meta")

    def _ends(self, mesh: Mesh, pp: int, folded: bool) -> Ends | None:
        takes = len(self.whole.mtp) or self.whole.config.tie_word_embeddings
        if folded or not takes or not self.whole.model.embed_tokens.weight.requires_grad:
            return None
        pairs = [[place, (pp - 1) * mesh.data.size() + place] for place in range(mesh.data.size())]
        groups = [dist.new_group(pair) for pair in pairs]  # by all ranks, each of them
        mine = next((group for group, pair in zip(groups, pairs, strict=True) if dist.get_rank() in pair), None)
        return mine and Ends(mine, self.last is not None)

    def run(self, loss: Loss, batches: Sequence[Batch], nominal: int, seed: Seed) -> list[Measured]:
        """Do forward and backward passes of all micro-batches of a step; gradients are of the sum over `nominal`.

        Returns what was measured in each; on the ranks without the last stage zeros, but their own experts' loads.
        """
        self._batches, self._loss, self._nominal, self._seed = batches, loss, nominal, seed
        self._measured: dict[int, Measured] = {}
        self._counts: list[Tensor | None] = [None] * len(batches)
        schedule = self._of(batches)
        numbers = torch.arange(len(batches))
        rows = [torch.cat([batch["input_ids"] for batch in batches])] if 0 in self.stages else []
        schedule.step(*rows, target=numbers, number=numbers, return_outputs=False)
        return self._shared()

    def _shared(self) -> list[Measured]:
        """Tell all stages what the last one measured: its names and shapes everywhere, its numbers there alone."""
        found = [self._measured[number] for number in sorted(self._measured)]
        shapes = [tree_map(lambda x: torch.empty_like(x, device="meta"), found)]
        dist.broadcast_object_list(shapes, dist.get_global_rank(self._group, self._rank_of[-1]), self._group)
        if not found:
            device = self._batches[0]["input_ids"].device
            found = tree_map(lambda x: torch.zeros_like(x, device=device), shapes[0])
        for each, counts in zip(found, self._counts, strict=True):
            if counts is not None and "counts" in each.metrics:
                each.metrics["counts"][: len(counts)] += counts
        return found

    def _of(self, batches: Sequence[Batch]) -> pipelining.schedules._PipelineSchedule:
        """The schedule for so many micro-batches of such a shape."""
        shape = (len(batches), *batches[0]["input_ids"].shape)
        if shape != self._shape:
            stages = [self._stage(stage, *shape[1:], batches[0]["input_ids"].device) for stage in self.stages]
            make = get_schedule_class(CLASSES[self._kind])
            given = stages[0] if issubclass(make, PipelineScheduleSingle) else stages
            self._schedule = make(given, shape[0], loss_fn=lambda loss, _: loss, scale_grads=False)
            self._shape = shape
        return self._schedule

    def _stage(self, number: int, rows: int, time: int, device: torch.device) -> pipelining.PipelineStage:
        """Shapes are given: to find them, torch would run the stages once, which would count tokens."""
        state = torch.empty(rows, time, self.whole.config.hidden_size, dtype=self._dtype, device="meta")
        passed = (state.requires_grad_(), torch.empty(rows, device="meta").requires_grad_())
        first = (torch.empty(rows, time, dtype=torch.int64, device="meta"),)
        last = torch.empty((), device="meta").requires_grad_()
        return pipelining.PipelineStage(
            self._turns[number], number, self.count, device, first if number == 0 else passed,
            last if number == self.count - 1 else passed, group=self._group,
            dw_builder=self._later[number].take if self._later else None,
        )  # fmt: skip

    def turn(self, number: int, micro_batch: int, received: Sequence[Tensor]) -> tuple[Tensor, ...] | Tensor:
        """Do the forward pass of a stage over a micro-batch; received: state and balance, or the ids at the first."""
        batch, stage = self._batches[micro_batch], self.stages[number]
        state, balance = received if number else (None, None)
        rows = len(batch["input_ids"])
        self._seed(micro_batch, number)

        def model(**inputs: Any) -> Output:
            return stage(**inputs, state=state, balance=balance)

        def work() -> tuple[Tensor, ...] | Tensor:
            with autocast(self._dtype, batch["input_ids"].device):
                if stage is not self.last:
                    out = model(**{name: batch[name] for name in INPUTS if name in batch})
                    self._count(micro_batch, out.counts)
                    balance = out.state.new_zeros(rows, dtype=torch.float32)
                    return out.state, balance if out.balance_loss is None else out.balance_loss
                loss, count, metrics = self._loss(model, batch)
                self._measured[micro_batch] = Measured(loss.detach(), count, metrics)
                return loss / self._nominal

        return self.within(work)

    def _count(self, micro_batch: int, counts: Tensor | None) -> None:
        if counts is not None:
            before = self._counts[micro_batch]
            self._counts[micro_batch] = counts.detach() if before is None else before + counts.detach()

    def infer(self, **inputs: Any) -> Output:
        """Run all stages once, without gradients. Only the last one's output has a head; loads are of this rank."""
        state = balance = out = None
        rows, device = len(inputs["input_ids"]), inputs["input_ids"].device
        shape, total = (*inputs["input_ids"].shape, self.whole.config.hidden_size), None
        for number in range(self.count):
            if number not in self.stages:
                continue
            before, after = (self._peer(other) for other in (number - 1, number + 1))
            if before is not None:
                state = torch.empty(shape, dtype=self._dtype, device=device)
                balance = torch.empty(rows, device=device)
                dist.recv(state, before), dist.recv(balance, before)
            out = self.stages[number](**inputs, state=state, balance=balance)
            state, balance = out.state, out.balance_loss
            if after is not None:
                dist.send(state.contiguous(), after)
                dist.send(torch.zeros(rows, device=device) if balance is None else balance, after)
            if out.counts is not None:
                total = out.counts if total is None else total + out.counts
        return out._replace(counts=total)

    def _peer(self, stage: int) -> int | None:
        """Return which rank of all has a stage, if it is another one."""
        if not 0 <= stage < self.count or stage in self.stages:
            return None
        return dist.get_global_rank(self._group, self._rank_of[stage])


class _Turn(nn.Module):
    """What a schedule calls for a stage."""

    def __init__(self, pipeline: Pipeline, number: int) -> None:
        super().__init__()
        self._turn, self._number = pipeline.turn, number

    def forward(self, *received: Tensor, number: Tensor) -> tuple[Tensor, ...] | Tensor:
        return self._turn(self._number, int(number), received)


class Piped(MiniDeepSeek):
    """A whole model whose forward pass, without gradients, is a matter of all stages."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.__dict__.update(pipeline.whole.__dict__)
        self._pipeline = [pipeline]  # in a list: its modules are not this one's

    def forward(self, input_ids: Tensor, **inputs: Any) -> Output:
        """As of the whole; see `Pipeline.infer`."""
        return self._pipeline[0].infer(input_ids=input_ids, **inputs)
