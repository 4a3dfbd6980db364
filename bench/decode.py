"""Greedy decoding against transformers' DeepseekV3 on the same weights, in turn.

python bench/decode.py [--preset 64m] [--dtype bf16] [--batch 1] [--prompt 128] [--new 64] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from side_by_side import Contender, compare, serve, table, verdict

from LMConfig import LMConfig
from model import MiniDeepSeek
from training.machine import DTYPES

PEERS = ("eager", "batched_mm", "grouped_mm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="64m")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=PEERS, help="experts_implementation of transformers")
    parser.add_argument("--json", help="write the measurements to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    config = LMConfig.preset(options.preset, num_nextn_predict_layers=0)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        MiniDeepSeek(config).save_pretrained(folder)
        arguments = [__file__, "--folder", folder, "--dtype", options.dtype, "--batch", str(options.batch)]
        arguments += ["--prompt", str(options.prompt), "--new", str(options.new)]
        ours = Contender("ours", [*arguments, "--worker", "ours"])
        peers = [Contender(f"transformers {peer}", [*arguments, "--worker", peer]) for peer in options.peers]
        compare([ours, *peers], options.rounds)
    print(
        f"{options.preset}, batch {options.batch}, prompt {options.prompt}, {options.new} new tokens, {options.dtype}; "
        f"medians of {options.rounds}"
    )
    print(table([ours, *peers], {"tokens/s": "{:,.1f}", "prefill s": "{:.3f}"}))
    best = max(peers, key=lambda peer: peer.median("tokens/s"))
    print(f"tokens/s against {best.name}: {verdict(ours, best, 'tokens/s')}")
    fastest = min(peers, key=lambda peer: peer.median("prefill s"))
    print(f"prefill time against {fastest.name}: {verdict(ours, fastest, 'prefill s')}")
    if options.json:
        results = {contender.name: contender.results for contender in [ours, *peers]}
        Path(options.json).write_text(json.dumps(results, indent=2), encoding="utf8")


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
