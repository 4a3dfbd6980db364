"""Greedy decoding against transformers' DeepseekV3 on the same weights, in turn.

python bench/decode.py [--preset 64m] [--dtype bf16] [--batch 1] [--prompt 128] [--new 64] [--rounds 5]
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from side_by_side import against_transformers, options_of, serve, table, verdict

from model import MiniDeepSeek
from training.machine import DTYPES

PEERS = ("eager", "batched_mm", "grouped_mm")


def main() -> None:
    options = options_of(__doc__, PEERS, batch=1, prompt=128, new=64)
    if options.worker:
        work(options)
        return
    _, ours, peers = against_transformers(__file__, options)
    print(
        f"{options.preset}, batch {options.batch}, prompt {options.prompt}, {options.new} new tokens, {options.dtype}; "
        f"medians of {options.rounds}"
    )
    print(table([ours, *peers], {"tokens/s": "{:,.1f}", "prefill s": "{:.3f}"}))
    best = max(peers, key=lambda peer: peer.median("tokens/s"))
    print(f"tokens/s against {best.name}: {verdict(ours, best, 'tokens/s')}")
    fastest = min(peers, key=lambda peer: peer.median("prefill s"))
    print(f"prefill time against {fastest.name}: {verdict(ours, fastest, 'prefill s')}")


def work(options: argparse.Namespace) -> None:
    """Decode in this process, once for each line on stdin. The prefill is measured apart and taken off."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 6400, (options.batch, options.prompt), generator=generator)
    if options.worker == "ours":
        model = MiniDeepSeek.from_pretrained(options.folder, dtype=DTYPES[options.dtype]).eval()

        def generate(count: int) -> None:
            model.generate(prompt, max_new_tokens=count)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            options.folder, dtype=DTYPES[options.dtype], experts_implementation=options.worker
        ).eval()
        model.generation_config.eos_token_id = None
        mask = torch.ones_like(prompt)

        def generate(count: int) -> None:
            model.generate(prompt, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            generate(count)
        return time.perf_counter() - start

    def measure() -> dict[str, float]:
        prefill = seconds(1)
        rest = seconds(options.new) - prefill
        return {"tokens/s": options.batch * (options.new - 1) / rest, "prefill s": prefill}

    serve(measure, warm_up=1)


if __name__ == "__main__":
    sys.exit(main())
