"""One training step against transformers' DeepseekV3: same weights, batch, type and optimiser, in turn.

python bench/train_step.py [--preset 64m] [--dtype bf16] [--rows 8] [--length 512] [--rounds 5]
"""

from __future__ import annotations

import argparse
import sys

import torch
from device import device_of, now
from side_by_side import against_transformers, findings, open_peer, options_of, serve, verdict

from model import MiniDeepSeek
from model.costs import count
from training.losses import NextTokenLoss
from training.machine import DTYPES, autocast, measured_peak
from training.optim.build import OptimSettings, build_optimizer

PEERS = ("eager", "grouped_mm")  # batched_mm copies an expert for each token: out of memory at 4096 tokens
COLUMNS = {"tokens/s": "{:,.0f}", "memory_mb": "{:,.0f}"}


def main() -> None:
    options = options_of(__doc__, PEERS, rows=8, length=512)
    if options.worker:
        work(options)
        return
    peak = measured_peak(DTYPES[options.dtype], device_of(options.device))
    config, ours, peers = against_transformers(__file__, options)
    shape = f"{options.rows} x {options.length} tokens, {options.dtype}"
    found = findings(
        f"training step, {options.preset} without MTP, {shape}, AdamW; medians of {options.rounds}", [ours, *peers]
    )
    best = max(peers, key=lambda peer: peer.median("tokens/s"))
    found.verdicts = [verdict(ours, best, key) for key in COLUMNS]
    peak = max(peak, measured_peak(DTYPES[options.dtype], device_of(options.device)))  # one may have been disturbed
    for contender in (ours, best):
        share = contender.median("tokens/s") * count(config, options.length).flops / peak
        found.facts[f"share of the matrix peak, {contender.name}"] = f"{share:.0%} of {peak / 1e9:,.0f} GFLOP/s"
    found.show(COLUMNS)
    found.save(options.json)


def work(options: argparse.Namespace) -> None:
    """Train in this process, a step for each line on stdin."""
    dtype, device = DTYPES[options.dtype], device_of(options.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 6400, (options.rows, options.length + 1), generator=generator).to(device)
    if options.worker == "ours":
        model = MiniDeepSeek.from_pretrained(options.folder)
        loss_of = NextTokenLoss(mtp=False)

        def loss() -> torch.Tensor:
            total, labels, _ = loss_of(model, {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]})
            return total / labels
    else:
        model = open_peer(options.folder, options.worker, torch.float32).train()

        def loss() -> torch.Tensor:
            return model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss

    optimizer = build_optimizer(model.to(device), OptimSettings(lr=1e-4))

    def measure() -> dict[str, float]:
        start = now(device)
        with autocast(dtype, device):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"tokens/s": options.rows * options.length / (now(device) - start)}

    serve(measure, device, warm_up=3)


if __name__ == "__main__":
    sys.exit(main())
