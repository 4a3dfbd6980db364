"""What real shapes cost, counted by the program: library calls, FLOPs and bytes of a step, on tensors without data.

python bench/gpu_shape.py      two tables, of which docs/performance.md shows the most
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from gpu_place import Finding, NotRun, Place, branches_for_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.costs import count
from model.decoding.graph import GraphRunner
from model.decoding.slot_cache import SlotCache
from training.losses import NextTokenLoss
from training.optim.build import OptimSettings, build_optimizer, step_scaled

ROWS, TIME = 64, 512  # of a training step in one micro-batch: 32,768 tokens
BLOCK = 8  # rows of an expert that a grouped product reads its matrix for
PAST = 512  # positions of a decoding step
PRESETS = ("64m", "1b-moe")
SEQUENCE_MONKEY = 1.5e9  # tokens
SHOWN = 4  # cards of the tables


@dataclass(frozen=True)
class Card:
    """Published dense bf16 FLOP/s with float32 sums, and bytes/s of its memory."""

    flops: float
    bandwidth: float


CARDS = {
    "RTX 3090": Card(71e12, 936e9),
    "RTX 4090": Card(165.2e12, 1008e9),
    "A100": Card(312e12, 2039e9),
    "H100": Card(989e12, 3350e9),
    "H200": Card(989e12, 4800e9),
}


@dataclass(frozen=True)
class Work:
    """Calls that compute or move something, their FLOPs and bytes, and the seconds that each card needs at least:
    of every call the larger of FLOPs / peak and bytes / bandwidth."""

    calls: float = 0
    flops: float = 0
    moved: float = 0
    seconds: tuple[float, ...] = (0.0,) * len(CARDS)

    def plus(self, other: Work, times: float = 1) -> Work:
        seconds = tuple(a + times * b for a, b in zip(self.seconds, other.seconds, strict=True))
        mine, theirs = (self.calls, self.flops, self.moved), (other.calls, other.flops, other.moved)
        return Work(*(a + times * b for a, b in zip(mine, theirs, strict=True)), seconds)


class Counter(TorchDispatchMode):
    """Adds up the work of what is called; views and empty memory are none."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self.names: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        result = function(*arguments, **named)
        name = str(function).split(".")[1]
        given = [x for x in tree_leaves((arguments, named)) if isinstance(x, Tensor)]
        held = {x.untyped_storage()._cdata for x in given}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in held]
        written = [
            x
            for argument, x in zip(function._schema.arguments, arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in tree_leaves(x)
            if isinstance(x, Tensor)
        ]
        if not (made or written) or name.startswith(("empty", "new_empty")) or name == "detach":
            return result
        moved = sum(map(size, (*given, *made, *written)))
        if name == "_grouped_mm" and given[1].dim() == 3:  # of the experts' matrices those that have rows
            rows, experts = given[0].shape[0], given[1].shape[0]
            moved -= size(given[1]) * (1 - min(1, rows / BLOCK / experts))
        elif name in ("embedding", "index_select", "index", "gather"):
            moved = 2 * sum(map(size, made)) + sum(map(size, given[1:]))  # what is read is as much as what is made
        flops = flops_of(name, function, arguments, named, result)
        seconds = tuple(max(flops / card.flops, moved / card.bandwidth) for card in CARDS.values())
        self.work = self.work.plus(Work(1, flops, moved, seconds))
        self.names[name] = self.names.get(name, 0) + 1
        return result


def size(x: Tensor) -> int:
    """Return bytes; of an expanded tensor only those that exist."""
    return x.itemsize * math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step)


def flops_of(name: str, function: Any, arguments: tuple, named: dict, result: Any) -> float:
    """Return those of a call; causal attention is half of a square."""
    if name == "_grouped_mm":
        a, b = arguments[:2]
        rows = a.shape[0] if a.dim() == 2 and b.dim() == 3 else a.shape[-1]
        return 2 * rows * (a.shape[-1] * b.shape[-1] if b.dim() == 3 else a.shape[0] * b.shape[-1])
    if name.startswith("_scaled_dot_product"):
        q, k, v = arguments[1:4] if "backward" in name else arguments[:3]
        pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] / 2
        return 2 * pairs * (q.shape[-1] + v.shape[-1]) * (2.5 if "backward" in name else 1)
    formula = flop_registry.get(function._overloadpacket)
    return 0 if formula is None else formula(*arguments, **named, out_val=result)


def by_layers(config: LMConfig, count_of: Callable[[LMConfig], Work]) -> Work:
    """Return the work of all layers, from networks of two and three: those with experts are alike."""
    few = config.first_k_dense_replace + 1
    two, three = (count_of(replace(config, num_hidden_layers=few + more)) for more in (0, 1))
    return two.plus(three.plus(two, -1), config.num_hidden_layers - few)


def training_work(config: LMConfig, rows: int = ROWS, time: int = TIME) -> Work:
    """Count one step in one micro-batch in bf16, with clipping and AdamW."""

    def count_of(config: LMConfig) -> Work:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = MiniDeepSeek(config)
            ids, optimizer = torch.zeros(rows, time, dtype=torch.long), build_optimizer(model, OptimSettings())
            with Counter() as counter:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    total, labels, _ = NextTokenLoss()(model, {"input_ids": ids, "labels": ids})
                (total / labels).backward()
                found = [p.grad for p in model.parameters() if p.grad is not None]
                torch.nn.utils.get_total_norm(found)
                step_scaled(optimizer, found, 0.5)
        return counter.work

    return by_layers(config, count_of)


def decoding_work(config: LMConfig, rows: int, past: int = PAST) -> Work:
    """Count one step of `rows` sequences in bf16 after `past` positions."""

    def count_of(config: LMConfig) -> Work:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
            torch.set_default_dtype(torch.bfloat16)
            try:
                model = MiniDeepSeek(config).eval()
            finally:
                torch.set_default_dtype(torch.float32)
            cache = SlotCache(config, rows, past, torch.bfloat16, torch.device("cpu"))
            step = GraphRunner(model, cache)
            cache.reserve_rows = lambda layers, batch, time: torch.zeros(batch, dtype=torch.int64)
            cache._end = past
            step.step(torch.zeros(rows, 1, dtype=torch.int64))  # makes what stays
            with Counter() as counter:
                step.step(torch.zeros(rows, 1, dtype=torch.int64))
        return counter.work

    return by_layers(replace(config, num_nextn_predict_layers=0), count_of)


def training(preset: str) -> Iterator[Finding]:
    """Yield the work of a step of a preset without MTP, beside the formula of `model.costs`."""
    config = LMConfig.preset(preset, num_nextn_predict_layers=0)
    work, tokens = training_work(config), ROWS * TIME
    yield Finding("FLOPs beside the formula", abs(work.flops / tokens / count(config, TIME).flops - 1), 0.05)
    yield Finding("calls of a step", work.calls, MOST_CALLS[preset], "calls")
    yield Finding("FLOPs of a step", work.flops / 1e9, unit="GFLOP")
    yield Finding("bytes of a step", work.moved / 1e9, unit="GB")


def train_64m(place: Place) -> Iterator[Finding]:
    yield from training("64m")


def train_1b_moe(place: Place) -> Iterator[Finding]:
    yield from training("1b-moe")


def decode(place: Place) -> Iterator[Finding]:
    for rows in (1, 128):
        work = decoding_work(LMConfig.preset("64m"), rows)
        yield Finding(f"calls in a graph, batch {rows}", work.calls, MOST_CALLS["decode"], "calls")
        yield Finding(f"FLOPs of a step, batch {rows}", work.flops / 1e9, unit="GFLOP")
        yield Finding(f"bytes of a step, batch {rows}", work.moved / 1e6, unit="MB")


def card(place: Place) -> Iterator[Finding]:
    raise NotRun("there is none")
    yield


# What is called today; a change that calls more must say why.
MOST_CALLS = {"64m": 2810, "1b-moe": 5640, "decode": 665}
CHECKS = {check.__name__: check for check in (card, train_64m, train_1b_moe, decode)}


def main() -> None:
    """Print the tables."""
    heads, rule = " | ".join(list(CARDS)[:SHOWN]), "|---" * (4 + SHOWN) + "|"
    with branches_for_cuda(Place(torch.device("cpu"), timed=False)):
        print(f"| training step | calls | FLOPs | bytes | {heads} |\n{rule}")
        for name in PRESETS:
            work = training_work(LMConfig.preset(name, num_nextn_predict_layers=0))
            hours = [SEQUENCE_MONKEY / ROWS / TIME * seconds / 3600 for seconds in work.seconds]
            cells = [f"{1e3 * s:,.0f} ms, {h:,.1f} h" for s, h in zip(work.seconds[:SHOWN], hours, strict=False)]
            print(line(f"`{name}`", work, 1e12, "T", 1e9, "GB", cells))
        print(f"\n| decoding step | calls | FLOPs | bytes | {heads} |\n{rule}")
        for name, rows in product(PRESETS, (1, 128)):
            work = decoding_work(LMConfig.preset(name), rows)
            cells = [f"{rows / seconds:,.0f} tok/s" for seconds in work.seconds[:SHOWN]]
            print(line(f"`{name}`, batch {rows}", work, 1e9, "G", 1e6, "MB", cells))


def line(name: str, work: Work, flops: float, kind: str, moved: float, unit: str, cells: list[str]) -> str:
    numbers = f"{work.calls:,.0f}", f"{work.flops / flops:,.1f} {kind}", f"{work.moved / moved:,.0f} {unit}"
    return f"| {' | '.join((name, *numbers, *cells))} |"


if __name__ == "__main__":
    main()
