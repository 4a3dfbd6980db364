"""One training step against transformers' DeepseekV3: same weights, batch, type and optimiser, interleaved.

python bench/train_step.py [--preset 64m] [--dtype bf16] [--rows 8] [--length 512] [--rounds 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import harness
import torch
from harness import MEMORY, SPEED, Verdict
from torch import Tensor, nn

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.costs import count
from training.losses import NextTokenLoss
from training.machine import DTYPES, autocast, measured_peak
from training.optim.build import OptimSettings, build_optimizer

PEERS = ("eager", "grouped_mm")  # batched_mm copies an expert for each token: out of memory at 4096 tokens
COLUMNS = {SPEED: "{:,.0f}", MEMORY: "{:,.0f}"}
Step = Callable[[], dict[str, float]]
PASSES, UPDATE = "forward+backward s", "optimiser s"


def main() -> None:
    parser = harness.parser_of(__doc__, rows=8, length=512)
    harness.add_peers(parser, *PEERS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    config = LMConfig.preset(options.preset, num_nextn_predict_layers=0)
    matrices = DTYPES[options.dtype], harness.device_of(options.device)
    peak = measured_peak(*matrices)
    with harness.checkpoint(config) as folder:
        workers = {"ours": "ours", **{f"transformers {peer}": peer for peer in options.peers}}
        ours, *baselines = harness.measured(workers, options.rounds, folder)
    peak = max(peak, measured_peak(*matrices))  # one may have been disturbed
    best = sorted(baselines, key=lambda one: one.median(SPEED))[-1:]  # or none
    facts = {}
    for contender in (ours, *best):
        share = contender.median(SPEED) * count(config, options.length).flops / peak
        facts[f"share of the matrix peak, {contender.name}"] = f"{share:.0%} of {peak / 1e9:,.0f} GFLOP/s"
    shape = f"{options.rows} x {options.length} tokens, {options.dtype}"
    title = f"training step, {options.preset} without MTP, {shape}, AdamW; medians of {options.rounds}"
    verdicts = [Verdict.between(ours, one, key) for one in best for key in COLUMNS]
    harness.report(title, [ours, *baselines], COLUMNS, verdicts, facts, options.json)


def work(options: argparse.Namespace) -> None:
    """Train in this process, a step for each line on stdin."""
    device = harness.device_of(options.device)
    if options.worker == "ours":
        step = own_step(MiniDeepSeek.from_pretrained(options.folder).to(device), options)
    else:
        model, tokens = harness.open_baseline(options.folder, options.worker, torch.float32), tokens_of(options)
        inputs = tokens[:, :-1]
        model.train().to(device)
        step = step_of(lambda: model(input_ids=inputs, labels=inputs, use_cache=False).loss, model, options)
    harness.serve(step, device, warm_up=3)


def tokens_of(options: argparse.Namespace) -> Tensor:
    """Return (rows, length + 1) random ids on the device."""
    shape, generator = (options.rows, options.length + 1), torch.Generator().manual_seed(0)
    return torch.randint(0, 6400, shape, generator=generator).to(harness.device_of(options.device))


def own_step(model: MiniDeepSeek, options: argparse.Namespace) -> Step:
    """Return a training step of our model, which returns its speed and its times."""
    tokens, loss_of = tokens_of(options), NextTokenLoss(mtp=False)

    def loss() -> Tensor:
        total, labels, _ = loss_of(model, {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]})
        return total / labels

    return step_of(loss, model, options)


def step_of(loss: Callable[[], Tensor], model: nn.Module, options: argparse.Namespace) -> Step:
    """Return the same for any model and loss."""
    device, kind = harness.device_of(options.device), getattr(options, "optim", "adamw")
    optimizer = build_optimizer(model, OptimSettings(lr=1e-4, kind=kind))

    def step() -> dict[str, float]:
        start = harness.now(device)
        with autocast(DTYPES[options.dtype], device):
            value = loss()
        value.backward()
        middle = harness.now(device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        end = harness.now(device)
        return {SPEED: options.rows * options.length / (end - start), PASSES: middle - start, UPDATE: end - middle}

    return step


if __name__ == "__main__":
    main()
