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

from errors import UserError
from model import MiniDeepSeek
from model.pipeline import Stage, WeightGradients
from model.transformer import Output
from training.losses import INPUTS, Batch, Loss, Metric
from training.machine import autocast
from training.parallel.placement import chunk_sizes

if TYPE_CHECKING:
    from training.parallel.dist_settings import ShardSettings
    from training.parallel.mesh import Mesh

CLASSES = {"1f1b": "1F1B", "zbv": "ZBVZeroBubble", "dualpipev": "DualPipeV"}
Work = Callable[[], Any]


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
        layers = layers_of(whole, self.count)
        self.stages = {
            stage: Stage(whole, layers[stage], stage == 0, stage == self.count - 1) for stage in sorted(mine)
        }
        self.last = self.stages.get(self.count - 1)
        self.within: Callable[[Work], Any] = lambda work: work()
        self._later = {stage: WeightGradients(module) for stage, module in self.stages.items() if folded}
        self._turns = {stage: _Turn(self, stage) for stage in self.stages}
        self._schedule, self._shape, self._shapes, self._template = None, None, None, ()
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

    def run(
        self, loss: Loss, batches: Sequence[Batch], nominal: int, seed: Callable[[int, int], None]
    ) -> list[Measured]:
        """Do forward and backward passes of all micro-batches of a step; gradients are of the sum over `nominal`.

        seed: called with micro-batch and stage before each forward pass, for what is drawn there.

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
        """Tell all stages what the last one measured: its names and shapes everywhere, its numbers there alone.

        These are told when they have changed, which nobody but the last stage knows: one number a step.
        """
        found = [[*self._measured[number]] for number in sorted(self._measured)]
        shapes = _each(found, lambda x: (x.shape, x.dtype))
        news = torch.tensor(int(self.last is not None and shapes != self._shapes))
        last = dist.get_global_rank(self._group, self._rank_of[-1]), self._group
        dist.broadcast(news, *last)
        if news:
            self._shapes, box = shapes, [_each(found, lambda x: torch.empty_like(x, device="meta"))]
            dist.broadcast_object_list(box, *last)
            (self._template,) = box
        if not found:
            device = self._batches[0]["input_ids"].device
            found = _each(self._template, lambda x: torch.zeros_like(x, device=device))
        for (*_, metrics), counts in zip(found, self._counts, strict=True):
            if counts is not None and "counts" in metrics:
                metrics["counts"][: len(counts)] += counts
        return [Measured(*each) for each in found]

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


def layers_of(whole: MiniDeepSeek, stages: int) -> list[range]:
    """Return the main layers of each stage; the MTP chain, on the last one, counts as layers too."""
    depths = len(whole.mtp)
    sizes = chunk_sizes(whole.config.num_hidden_layers + depths, stages)
    sizes[-1] -= depths
    ends = [sum(sizes[: place + 1]) for place in range(stages)]
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def check_stages(whole: MiniDeepSeek, settings: ShardSettings) -> None:
    """Raise `UserError` where the layers of a stage are all frozen, as where only some have adapters."""
    for number, layers in enumerate(layers_of(whole, settings.stages), 1):
        if layers and not any(p.requires_grad for index in layers for p in whole.model.layers[index].parameters()):
            raise UserError(
                f"--dist.pp {settings.pp}: nothing trains in stage {number} of {settings.stages} "
                f"({settings.schedule}); lower it, or give --lora.targets attention too"
            )


def _each(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(part, dict):
        return {name: _each(value, change) for name, value in part.items()}
    if isinstance(part, (tuple, list)):
        return tuple(_each(value, change) for value in part)
    return change(part)
