"""A training step with more and more routed experts, each token still using as many weights, interleaved.

python bench/experts.py [--preset 64m] [--experts 16 64 256] [--split] [--optim adamw_bf16]

`num_experts_per_tok` x `moe_intermediate_size`, the width of the routed experts that one token goes through, is the
same in every column, and so are the products of a step. By default each expert stays as it is and the layer's weights
grow with their number: casting, gradient, clipping and AdamW have as much more to do. With `--split` experts are cut
into narrower ones of which a token takes more (DeepSeekMoE's fine-grained experts, Dai et al. 2024, section 3.1): 4
times the experts, a quarter of the width each; the first number has experts of 4 times the preset's width, one a token.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import harness
import torch
from harness import MEMORY, SPEED, Verdict
from train_step import PASSES, UPDATE, own_step

from LMConfig import LMConfig
from model import MiniDeepSeek


def main() -> None:
    parser = harness.parser_of(__doc__, rows=8, length=512, layers=0)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--split", action="store_true", help="narrower experts, not more weights")
    parser.add_argument("--optim", default="adamw", choices=("adamw", "adamw_bf16"))
    options = parser.parse_args()
    if options.worker:
        torch.manual_seed(0)
        device = harness.device_of(options.device)
        model = MiniDeepSeek(config_of(options, int(options.worker))).to(device)
        harness.serve(own_step(model, options), device, warm_up=3)
        return
    first, *more = contenders = harness.measured({f"{n} experts": str(n) for n in options.experts}, options.rounds)
    shape = (
        f"{config_of(options, options.experts[0]).num_hidden_layers} layers, {options.rows} x {options.length} tokens"
    )
    title = (
        f"training step with {'narrower' if options.split else 'more'} experts, {options.preset} without MTP, {shape}, "
        f"{options.dtype}, {options.optim}; medians of {options.rounds}"
    )
    verdicts = [Verdict.between(one, first, SPEED, f"{SPEED}, {one.name}") for one in more]
    columns = {SPEED: "{:,.0f}", PASSES: "{:.3f}", UPDATE: "{:.3f}", MEMORY: "{:,.0f}"}
    harness.report(title, contenders, columns, verdicts, {}, options.json)


def config_of(options: argparse.Namespace, count: int) -> LMConfig:
    """Return the preset with `count` experts and the same activated width."""
    config = LMConfig.preset(options.preset, num_nextn_predict_layers=0, n_routed_experts=count)
    config = replace(config, num_hidden_layers=options.layers or config.num_hidden_layers)
    if not options.split:
        return config
    width = config.num_experts_per_tok * config.moe_intermediate_size
    chosen = count // options.experts[0]
    # A token that takes one expert of all cannot be held to half of the groups.
    return replace(config, num_experts_per_tok=chosen, moe_intermediate_size=width // chosen, n_group=1, topk_group=1,
                   n_shared_experts=chosen)  # fmt: skip


if __name__ == "__main__":
    main()
