"""A training step with more and more routed experts, each token still using as many weights, in turn.

python bench/experts.py [--preset 64m] [--experts 16 64 256] [--layers 0] [--split] [--optim adamw_bf16]

Constant activated size: `num_experts_per_tok` x `moe_intermediate_size`, the width of the routed experts that one token
goes through, is the same in every column, and so are the products of a step. There are two ways to have more experts:

- by default each expert stays as it is, so that the layer's weights grow with their number: 256 experts hold 16 times
  what 16 hold, and casting, gradient, clipping and AdamW have as much more to do, whatever the products cost;
- with `--split` experts are cut into narrower ones of which a token takes more (DeepSeekMoE's fine-grained experts,
  Dai et al. 2024, section 3.1), so that the weights stay as many: 4 times the experts, a quarter of the width each.
  The first of the numbers has experts of 4 times the preset's width, one a token.

Below the tokens a second stands where a step's time goes: forward and backward, and the optimiser (clipping, AdamW).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

import torch
from device import add_device, device_of, memory_mb, now
from side_by_side import Contender, compare, findings, verdict

from LMConfig import LMConfig
from model import MiniDeepSeek
from training.losses import NextTokenLoss
from training.machine import DTYPES, autocast
from training.optim.build import OptimSettings, build_optimizer

GIVEN = ("preset", "layers", "dtype", "optim", "rows", "length", "device")  # to the workers
COLUMNS = {"tokens/s": "{:,.0f}", "forward+backward s": "{:.3f}", "optimiser s": "{:.3f}", "memory_mb": "{:,.0f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="64m")
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the preset has")
    parser.add_argument("--split", action="store_true", help="narrower experts, not more weights")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--optim", default="adamw", choices=("adamw", "adamw_bf16"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the measurements to this file")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    add_device(parser)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    given = [f"--{name}={getattr(options, name)}" for name in GIVEN]
    given += ["--split"] * options.split + ["--experts", *map(str, options.experts)]
    contenders = [
        Contender(f"{count} experts", [__file__, *given, "--worker", str(count)]) for count in options.experts
    ]
    compare(contenders, options.rounds)
    config = config_of(options, options.experts[0])
    found = findings(
        f"training step with {'narrower' if options.split else 'more'} experts, {options.preset} without MTP, "
        f"{config.num_hidden_layers} layers, "
        f"{options.rows} x {options.length} tokens, {options.dtype}, {options.optim}; medians of {options.rounds}",
        contenders,
    )
    first, *more = contenders
    found.verdicts = [replace(verdict(one, first, "tokens/s"), quantity=f"tokens/s, {one.name}") for one in more]
    found.show(COLUMNS)
    found.save(options.json)


def config_of(options: argparse.Namespace, count: int) -> LMConfig:
    """The preset with `count` experts and the same activated width."""
    config = LMConfig.preset(options.preset, num_nextn_predict_layers=0, n_routed_experts=count)
    config = replace(config, num_hidden_layers=options.layers or config.num_hidden_layers)
    if not options.split:
        return config
    width = config.num_experts_per_tok * config.moe_intermediate_size
    chosen = count // options.experts[0]
    # A token that takes one expert of all cannot be held to half of the groups.
    return replace(config, num_experts_per_tok=chosen, moe_intermediate_size=width // chosen, n_group=1, topk_group=1,
                   n_shared_experts=chosen)  # fmt: skip


def work(options: argparse.Namespace) -> None:
    """Train in this process, a step for each line on stdin."""
    device, dtype = device_of(options.device), DTYPES[options.dtype]
    torch.manual_seed(0)
    model = MiniDeepSeek(config_of(options, options.worker)).to(device)
    tokens = torch.randint(0, model.config.vocab_size, (options.rows, options.length + 1)).to(device)
    batch, loss_of = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}, NextTokenLoss(mtp=False)
    optimizer = build_optimizer(model, OptimSettings(lr=1e-4, kind=options.optim))

    def measure() -> dict[str, float]:
        start = now(device)
        with autocast(dtype, device):
            loss, _, _ = loss_of(model, batch)
        (loss / tokens[:, 1:].numel()).backward()
        middle = now(device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        end = now(device)
        return {
            "tokens/s": options.rows * options.length / (end - start), "forward+backward s": middle - start,
            "optimiser s": end - middle,
        }  # fmt: skip

    for _ in range(3):
        measure()
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps({**measure(), "memory_mb": memory_mb(device)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
