"""One mesh of processes that train a small model, and what is counted in a step: bytes sent, products, memory."""

from __future__ import annotations

import os
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from scale_trace import Event, Trace
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from errors import UserError
from eval.paper.speed import RandomRows
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.experts import Experts
from model.kernels import products
from model.kernels.grouped import GroupedLinear
from model.ops import Linear
from model.pipeline import WeightGradients
from text.tokenizer_training import train_bpe
from training.losses import NextTokenLoss
from training.parallel.dist_settings import ShardSettings
from training.parallel.plan import Plan, PlannedMesh, PlanSettings
from training.parallel.ranks import Ranks
from training.settings import NextTokenSettings, model_config
from training.trainer import Trainer

SMALL = dict(
    preset="demo", vocab_size=512, moe_intermediate_size=64, num_hidden_layers=7, num_experts_per_tok=4,
    num_nextn_predict_layers=1, tie_word_embeddings=False,
)  # fmt: skip
NO_PACE: Mapping[tuple[int, str], float] = {}
SECONDS = 300.0  # that a mesh may take


@dataclass
class Mesh:
    """Ranks and how they work together. rows: of a step, each a micro-batch of `time` tokens; model: of pretrain.py."""

    world: int
    cut: dict[str, Any] = field(default_factory=dict)
    rows: int = 16
    time: int = 64
    model: dict[str, Any] = field(default_factory=lambda: SMALL)
    recomputed: bool = False

    def settings(self, out: str) -> NextTokenSettings:
        """Return those of training."""
        return NextTokenSettings(out=out, dist=ShardSettings(**self.cut), max_steps=9, save_every=0, **self._given())

    def plan(self) -> Plan:
        """Return what the formulas say; each rank counts as a node."""
        dist = PlannedMesh(**{"schedule": "1f1b", **self.cut})
        return Plan(PlanSettings(model=self.model, dist=dist, gpus=self.world, node=1, **self._given()))

    @property
    def config(self) -> LMConfig:
        return model_config(self.model)

    def _given(self) -> dict[str, Any]:
        given = {"sequence_length": self.time, "micro_tokens": self.time, "batch_tokens": self.rows * self.time}
        return {**given, "dtype": "bf16", "device": "cpu", "gradient_checkpointing": self.recomputed}


@dataclass
class Counted:
    """What one rank did in a step.

    Attributes:
        sent: bytes by kind. products: with weights, by forward, dX and dW. of: how many a micro-batch has.
        rows_sent: to other ranks' experts, a token and layer. state: bytes of weights in float32 and moments.
        peak: of what is allocated beside it. events: of a pipeline, in another step.
    """

    sent: dict[str, float]
    products: dict[str, int]
    of: int
    rows_sent: float
    state: int
    peak: int
    events: list[Event] = field(default_factory=list)


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends, by kind: what each call carries, around a ring.

    That every call of torch.distributed, of DDP's and FSDP2's too, is an operator `c10d::...`, makes them visible here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func.namespace == "c10d":
            kind, carried = self._of(func._opname, args)
            self.bytes[kind] += carried
        return func(*args, **(kwargs or {}))

    def _of(self, name: str, args: tuple) -> tuple[str, float]:
        boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        group = dist.ProcessGroup.unbox(boxed)
        n, mine = group.size(), group.rank()
        if name == "allreduce_":
            return "all-reduce", 2 * (n - 1) / n * _nbytes(args[0])
        if name == "_reduce_scatter_base_":
            return "reduce-scatter", (n - 1) / n * _nbytes(args[1])
        if name == "_allgather_base_":
            return "all-gather", (n - 1) * _nbytes(args[1])
        if name == "alltoall_base_":
            rows, splits = args[1], args[4] or [len(args[1]) // n] * n
            return "all-to-all", (sum(splits) - splits[mine]) * rows[:1].nbytes
        if name == "send":
            return "point to point", _nbytes(args[0])
        return ("received", 0) if name == "recv_" else ("other", (n - 1) / n * _nbytes(args[0]))


def _nbytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(map(_nbytes, tensors))


@contextmanager
def counting_products() -> Iterator[Counter[str]]:
    """Count products with the weights of linear layers and experts: forward, dX, dW. The router's are not among them.

    All go through two autograd functions, of which a gradient that is not None is a product, or through the store.
    """
    found: Counter[str] = Counter()

    def forward(ctx: Any, *args: Any, original: Callable) -> Tensor:
        found["forward"] += 1
        return original(ctx, *args)

    def backward(ctx: Any, *args: Any, original: Callable) -> tuple:
        to_x, to_weight, *others = original(ctx, *args)
        found["dX"] += to_x is not None
        found["dW"] += to_weight is not None
        return to_x, to_weight, *others

    def add(store: WeightGradients, work: Callable[[], None], original: Callable = WeightGradients.add) -> None:
        original(store, lambda: (found.update(["dW"]), work()))

    with ExitStack() as stack:
        stack.enter_context(patch.object(products, "fits", lambda *_: torch.is_grad_enabled()))
        stack.enter_context(patch.object(WeightGradients, "add", add))
        for function in (products.LinearProduct, GroupedLinear):
            for name, counter in (("forward", forward), ("backward", backward)):
                original = getattr(function, name)
                counted = staticmethod(lambda ctx, *args, c=counter, o=original: c(ctx, *args, original=o))
                stack.enter_context(patch.object(function, name, counted))
        yield found


def peak_of(work: Callable[[], object]) -> int:
    """Return the most bytes that `work` has allocated at a time, by the allocator's own reports."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def count(mesh: Mesh, memory: bool = True, pace: Mapping[tuple[int, str], float] = NO_PACE) -> list[Counted]:
    """Train some steps on a mesh. Returns what each rank did in one.

    memory: whether its peak is asked for, which takes a step more; pace: see `Trace`, of the step whose events stay.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork, pipes, processes = get_context("fork"), [], []
    with tempfile.TemporaryDirectory() as out:
        for rank in range(mesh.world):
            ours, theirs = fork.Pipe()
            given = (mesh, rank, port, out, memory, pace, theirs)
            processes.append(fork.Process(target=_process, args=given, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            found = [pipe.recv() if pipe.poll(SECONDS) else None for pipe in pipes]
        except EOFError:
            found = [None]
        for process in processes:
            if None in found:
                process.kill()
            process.join()
    if None in found:
        raise UserError(f"{mesh.world} ranks, {mesh.cut}: a rank has ended without a result; its output says why")
    return found


def _process(mesh: Mesh, rank: int, port: int, out: str, memory: bool, pace: Mapping, result: Connection) -> None:
    given = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=mesh.world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in given.items()}, GLOO_SOCKET_IFNAME="lo")
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler says when it begins and ends
    torch.set_num_threads(1)
    result.send(_counted(mesh, out, memory, pace))
    dist.barrier()  # a rank that leaves takes its connections with it
    os._exit(0)


def _counted(mesh: Mesh, out: str, memory: bool, pace: Mapping) -> Counted:
    ranks = Ranks.start("cpu", timeout=SECONDS)
    torch.manual_seed(0)
    tokenizer = train_bpe(["one tokenizer"], 280, min_frequency=1)
    model, rows = MiniDeepSeek(mesh.config), RandomRows(mesh.time, mesh.config.vocab_size)
    with patch("training.trainer.machine_peak", lambda *_: 1e12):  # nobody asks for the MFU
        trainer = Trainer(mesh.settings(out), ranks, model, tokenizer, rows, NextTokenLoss(mtp=len(model.mtp) > 0))
    trainer.pace.known = True  # or it would say how long the run will take

    with Trace() as trace:
        trainer.advance()  # there is state of the optimiser now, and FSDP2 has met its units
        modules = list((trainer.copies.parts if trainer.shards else trainer.model).modules())
        experts = [module for module in modules if isinstance(module, Experts)]
        rows_before = sum(getattr(module, "rows_sent", 0) for module in experts)
        with Sent() as sent, counting_products() as found:
            trainer.advance()
        rows = sum(getattr(module, "rows_sent", 0) for module in experts) - rows_before
        peak = peak_of(trainer.advance) if memory else 0
        if trainer.copies.pipeline:
            trace.events, trace.pace = [], pace
            trainer.advance()
    held = [p for _, p in (trainer.shards or trainer.model).named_parameters()]
    held += [value for state in trainer.optimizer.state.values() for value in state.values() if value.dim()]
    of = sum(isinstance(module, Linear) for module in modules) + 2 * len(experts)
    passes = found["forward"] / max(of, 1) if mesh.recomputed else mesh.rows // ranks.world * mesh.cut.get("pp", 1)
    tokens = passes * mesh.time * max(len(experts), 1)
    return Counted(dict(sent.bytes), dict(found), of, rows / tokens, sum(p.nbytes for p in held), peak, trace.events)
