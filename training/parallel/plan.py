"""What a run would need on so many GPUs, from formulas alone: memory, communication, bubbles, time, GPU hours.

python -m training.parallel.plan --config configs/deepseek-v3.yaml --gpus 2048
python -m training.parallel.plan --config configs/1b-moe.yaml --gpus 8 --gpu h100 --dist.ep 4
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from cli import parse
from errors import UserError, check_least, command_line
from model.costs import count, human
from training.parallel.dist_settings import ShardSettings
from training.parallel.formulas import BF16, BUBBLES, FP32, GPUS, Line, exchanged, kept_by_report, kept_bytes, rows_sent
from training.parallel.mesh_checks import check_pipeline
from training.parallel.placement import Part, parts, shared_by_ends
from training.run.estimate import MOMENTS
from training.settings import NextTokenSettings, model_config

SPARE = 3e9  # bytes of a GPU for CUDA, NCCL, the logits of a chunk and what lies between blocks of memory


@dataclass
class PlannedMesh(ShardSettings):
    """As in training, and one schedule more, which can be planned only: dualpipe."""

    schedule: str = "dualpipev"

    SCHEDULES: ClassVar[tuple[str, ...]] = tuple(BUBBLES)


@dataclass(kw_only=True)
class PlanSettings(NextTokenSettings):
    """Settings of a training run, and the machines to plan it for.

    Args:
        model: preset and changes to single fields of LMConfig, as of pretrain.py.
        gpus: ranks; gpu: a100, h100, h200 or h800; node: GPUs with NVLink between them.
        share: of the peak in bf16 that the products of a rank reach while it computes.
    """

    out: str = ""
    model: dict[str, Any] = field(default_factory=lambda: {"preset": "64m"})
    dist: PlannedMesh = field(default_factory=PlannedMesh)
    gpus: int = 8
    gpu: str = "h800"
    node: int = 8
    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(1, gpus=self.gpus, node=self.node)
        if self.gpu not in GPUS:
            raise UserError(f"--gpu {self.gpu}: one of {', '.join(GPUS)}")
        if not 0 < self.share <= 1:
            raise UserError(f"--share {self.share:g}: give a share of the peak, above 0 and at most 1")


class Plan:
    """The numbers of a run by name: `plan.of["GPU hours"]`. Raises `UserError` where ranks cannot share the work."""

    def __init__(self, settings: PlanSettings) -> None:
        self.settings, self.dist, self.gpu = settings, settings.dist, GPUS[settings.gpu]
        self.config = model_config(settings.model)
        self.tokens = settings.micro_rows * settings.row_tokens  # of a micro-batch
        self.data = settings.gpus // self.dist.pp  # ranks that hold the same layers
        self.copies = self.data // self.dist.ep  # of each expert
        self.zero = self.dist.zero or int(self.dist.cuts(settings.gpus))
        self._check()
        self.micro_batches = settings.rows // self.data // settings.micro_rows
        self.folded = self.dist.schedule in PlannedMesh.FOLDED and self.dist.pp > 1
        self.parts = parts(self.config, self.dist.pp, self.folded, settings.sequence_length)
        self.rows = rows_sent(self.config, self.dist.ep, settings.node)
        self.slowest = max(self.parts, key=self._pace)
        self.fullest = max(range(self.dist.pp), key=self._memory)
        self.sections = {
            "model": self._model(),
            "mesh": self._mesh(),
            f"memory of rank {self.fullest} of the pipeline, the fullest": self.memory(self.fullest),
            "activations there, by what is computed again": self.recomputed(self.fullest),
            "one micro-batch on the slowest rank": self._micro_batch(),
            "bubble of a step, by schedule": self._bubbles(),
            "one step": self._step(),
        }

    @property
    def of(self) -> dict[str, float]:
        """Return every number by its name."""
        return {line.name: line.value for lines in self.sections.values() for line in lines}

    def verdict(self) -> str:
        """Say whether it fits, or what does not."""
        need, has = self.of["sum"], self.gpu.memory
        if need <= has:
            return f"fits: {human(need, 'B')} of {human(has, 'B')} on the fullest rank"
        largest = max(self.memory(self.fullest)[:-1], key=lambda line: line.value)
        remedies = []
        if largest.name == "activations":
            if not self.settings.gradient_checkpointing:
                remedies.append("--gradient_checkpointing true")
            if self.settings.micro_rows > 1:
                remedies.append(f"a smaller --micro_tokens, now {self.settings.micro_tokens}")
        elif self.zero < 3 and self.data > 1 and (self.zero == 0 or self.dist.pp == 1):
            remedies.append(f"--dist.zero {1 if self.zero == 0 else 3}")
        remedies.append("more --dist.ep, more --dist.pp or more --gpus")
        return (
            f"does not fit: {human(need, 'B')} of {human(has, 'B')} on the fullest rank, most of it {largest.name} "
            f"({human(largest.value, 'B')}); give {', or '.join(remedies)}"
        )

    def _check(self) -> None:
        settings, dist = self.settings, self.dist
        if settings.gpus % (dist.pp * dist.ep):
            shared = f"--dist.pp {dist.pp} x --dist.ep {dist.ep}"
            raise UserError(f"--gpus {settings.gpus}: is no multiple of {shared} = {dist.pp * dist.ep}")
        if self.config.n_routed_experts % dist.ep:
            experts = self.config.n_routed_experts
            raise UserError(f"--dist.ep {dist.ep}: does not divide the {experts} experts of a layer")
        if dist.pp > 1:
            check_pipeline(settings, self.data, self.config)
        step = self.data * settings.micro_rows * settings.row_tokens
        if settings.rows * settings.row_tokens % step:
            raise UserError(
                f"--batch_tokens {settings.batch_tokens}: is no multiple of {self.data} ranks with the same layers x "
                f"--micro_tokens {settings.micro_tokens}"
            )

    def _model(self) -> list[Line]:
        costs = count(self.config, self.settings.sequence_length)
        return [
            Line("parameters", costs.total, "", "without MTP"),
            Line("activated", costs.activated, "", "of them by one token"),
            Line("MTP adds", costs.mtp, "", ""),
            Line("training FLOPs a token", costs.flops, "", "6 a weight in a product, and causal attention's"),
        ]

    def _mesh(self) -> list[Line]:
        dist, pp = self.dist, self.dist.pp
        return [
            Line("ranks", self.settings.gpus, "", f"pp {pp} x data {self.data}; ep {dist.ep}, zero {self.zero}"),
            Line("copies of each expert", self.copies, "", f"data {self.data} / ep {dist.ep}"),
            Line("micro-batches a step", self.micro_batches, "", f"batch / data / {self.tokens} tokens"),
        ]

    def memory(self, rank: int) -> list[Line]:
        """Return what a rank of the pipeline holds, in bytes, and the sum."""
        part, ep, zero = self.parts[rank], self.dist.ep, self.zero
        experts = part.experts / ep
        held = part.weights + experts
        sharded = part.weights / self.data + experts / self.copies
        moments = MOMENTS[self.settings.optim.kind]
        gathered = min(held, 2 * held / max(len(part.layers), 1))  # of a layer, and of the next one
        state = held if zero == 0 else sharded
        over = "" if zero == 0 else f" over data {self.data} (experts: {self.copies})"
        lines = [
            Line("weights in bf16", BF16 * (gathered if zero == 3 else held), "B",
                 f"2 x {human(held)} parameters" + (", two layers of them gathered" if zero == 3 else "")),
            Line("gradients in fp32", FP32 * (sharded + gathered if zero == 3 else held), "B",
                 "4 x the same" + (f"{over}, and two layers" if zero == 3 else "")),
            Line("optimiser and fp32 weights", (FP32 + moments) * state, "B",
                 f"(4 + {moments}) x the same{over}; --optim.kind {self.settings.optim.kind}"),
            Line("activations", self._activations(rank), "B",
                 f"recomputed: {'whole layers' if self.settings.gradient_checkpointing else 'nothing'}"),
            Line("spare", SPARE, "B", "CUDA, NCCL, logits"),
        ]  # fmt: skip
        return [*lines, Line("sum", sum(line.value for line in lines), "B", f"of {human(self.gpu.memory, 'B')}")]

    def _activations(self, rank: int) -> float:
        return self.recomputed(rank)[2 if self.settings.gradient_checkpointing else 0].value

    def recomputed(self, rank: int) -> list[Line]:
        """Return the activations of all micro-batches that are under way on a rank of the pipeline, in three ways."""
        config, layers = self.config, self.parts[rank].layers
        flying = min(self._in_flight(rank), self.micro_batches)
        whole, some = (
            [kept(config, config.is_moe_layer(index)) for index in layers] for kept in (kept_bytes, kept_by_report)
        )
        entering = flying * BF16 * config.hidden_size * len(layers) + max(whole, default=0)
        of = f"{flying:g} micro-batches of {self.tokens} tokens, {len(layers)} layers"
        return [
            Line("nothing", self.tokens * flying * sum(whole), "B", f"{of}: all that the backward pass needs"),
            Line("as in the report", self.tokens * flying * sum(some), "B",
                 "norms, MLA's up-projections, SwiGLU; caches in FP8 (3.2.3, 3.3.3); not built here"),
            Line("whole layers", self.tokens * entering, "B", "what enters a layer, and all of the one at work"),
        ]  # fmt: skip

    def _in_flight(self, rank: int) -> float:
        if self.dist.pp == 1:
            return 1
        return self.dist.pp - rank if self.dist.schedule == "1f1b" else BUBBLES[self.dist.schedule][2](self.dist.pp)

    def _memory(self, rank: int) -> float:
        return self.memory(rank)[-1].value

    def _seconds(self, part: Part) -> tuple[float, float, float]:
        """Return F, B and W of a micro-batch: a third of the products each is forward, by inputs, by weights."""
        third = part.flops / 3 * self.tokens / (self.gpu.flops * self.settings.share)
        return third, third * (3 if self.settings.gradient_checkpointing else 2), third

    def _sent(self, part: Part) -> tuple[float, float, float]:
        """Return what a rank sends of a micro-batch to experts, over IB and NVLink, in bytes, and the seconds of it."""
        moe = sum(self.config.is_moe_layer(index) for index in part.layers)
        row = self.tokens * moe * self._journeys * BF16 * self.config.hidden_size
        ib, nvlink = row * self.rows.ib, row * self.rows.nvlink
        return ib, nvlink, max(ib / self.gpu.ib, nvlink / self.gpu.nvlink)

    def _passed(self, rank: int) -> int:
        """Return the bytes of a micro-batch that a rank passes to its neighbours: states on, their gradients back."""
        neighbours = (rank > 0) + (rank < self.dist.pp - 1)
        return neighbours * (2 if self.folded else 1) * BF16 * self.config.hidden_size * self.tokens

    def _exchanged(self, part: Part) -> dict[str, float]:
        held = part.weights * (1 - 1 / self.data) + part.experts / self.dist.ep * (1 - 1 / self.copies)
        return exchanged(self.zero, held, self.micro_batches)

    def sent(self, rank: int) -> dict[str, float]:
        """Return the bytes that a rank of the pipeline sends in a step, by kind."""
        (ib, nvlink, _), many = self._sent(self.parts[rank]), self.micro_batches
        ends = {"all-reduce": FP32 * shared_by_ends(self.config, self.dist.pp, self.folded, rank) / self.data}
        moved = {"all-to-all": many * (ib + nvlink), "point to point": many * self._passed(rank)}
        return ends | self._exchanged(self.parts[rank]) | moved

    def _pace(self, part: Part) -> float:
        """Return the seconds of a micro-batch: DualPipe sends what one computes while it computes another."""
        computing, sending = sum(self._seconds(part)[:2]), self._sent(part)[2]
        return max(computing, sending) if self._overlapped else computing + sending

    @property
    def _journeys(self) -> int:
        """Return how often a row travels: to the experts and back, forward and backward; recomputed, once more."""
        return 6 if self.settings.gradient_checkpointing else 4

    @property
    def _overlapped(self) -> bool:
        return self.dist.pp > 1 and self.dist.schedule in ("dualpipe", "dualpipev")

    def _micro_batch(self) -> list[Line]:
        part = self.slowest
        forward, backward, _ = self._seconds(part)
        ib, nvlink, sending = self._sent(part)
        again = ", the forward pass again" if self.settings.gradient_checkpointing else ""
        passed = self._passed(self.parts.index(part))
        of = "2 B x hidden x tokens, each way and each of its stages" if passed else "one stage"
        speeds = f"at {human(self.gpu.ib, 'B/s')} and {human(self.gpu.nvlink, 'B/s')}, at once"
        return [
            Line("forward F", forward, "s", f"FLOPs / 3 / ({self.settings.share:g} x {human(self.gpu.flops)}FLOP/s)"),
            Line("backward B", backward, "s", f"2 F{again}"),
            Line("rows a token over IB", self.rows.ib, "", f"ranks on other nodes; the nodes: {self.rows.nodes:.2f}"),
            Line("rows a token over NVLink", self.rows.nvlink, "", "other ranks of its node"),
            Line("to the experts over IB", ib, "B", f"{self._journeys} x 2 B x hidden x rows x MoE layers"),
            Line("to the experts over NVLink", nvlink, "B", "the same"),
            Line("time of it", sending, "s", f"{speeds}{'; behind computation' if self._overlapped else ''}"),
            Line("to the next stage, and back", passed, "B", of),
        ]

    def _bubbles(self) -> list[Line]:
        F, B, W = self._seconds(self.slowest)
        return [Line(name, idle(self.dist.pp, F, B, W) if self.dist.pp > 1 else 0, "s", formula)
                for name, (formula, idle, _) in BUBBLES.items()]  # fmt: skip

    def _step(self) -> list[Line]:
        settings, part, costs = self.settings, self.slowest, count(self.config, self.settings.sequence_length)
        bubble = next(line.value for line in self._bubbles() if line.name == self.dist.schedule)
        gradients = sum(self._exchanged(part).values())
        link = self.gpu.nvlink if self.settings.gpus <= settings.node else self.gpu.ib
        seconds = self.micro_batches * self._pace(part) + bubble + gradients / link
        batch = settings.rows * settings.row_tokens
        hours = seconds * settings.gpus / 3600 / batch * 1e12
        mfu = costs.flops * batch / seconds / settings.gpus / self.gpu.flops
        run = settings.max_tokens or 0
        lines = [
            Line("micro-batches", self.micro_batches * self._pace(part), "s",
                 "F + B, or the time of sending" if self._overlapped else "F + B + the time of sending"),
            Line("bubble", bubble, "s", self.dist.schedule if self.dist.pp > 1 else "one stage"),
            Line("gradients and weights", gradients, "B",
                 f"a ring over the data ranks, {human(link, 'B/s')}, behind nothing"),
            Line("step", seconds, "s", "their sum"),
            Line("MFU", mfu, "", "FLOPs of the model / (GPUs x peak in bf16)"),
            Line("GPU hours a T tokens", hours, "", "step x GPUs / tokens of a step"),
        ]  # fmt: skip
        if run:
            lines.append(Line("GPU hours", hours * run / 1e12, "", f"{human(run)} tokens"))
            lines.append(Line("days", hours * run / 1e12 / settings.gpus / 24, "", f"on {settings.gpus} GPUs"))
        return lines


def main() -> None:
    settings = parse(PlanSettings, __doc__ or "")
    plan = Plan(settings)
    for title, lines in plan.sections.items():
        print(title)
        print("\n".join(map(str, lines)))
    print(plan.verdict())


if __name__ == "__main__":
    command_line(main)
