"""Many prompts of one length with completions of very different lengths: continuous batching against batches that wait.

Ours keeps `slots` sequences running and fills a free one at once. Beside it stand ours in lock step and transformers'
`generate` on the same weights, in batches of `slots` that each last until their longest completion ends.

python bench/batching.py [--preset demo] [--requests 128] [--slots 32] [--prompt 32] [--new 128] [--rounds 5]
"""

from __future__ import annotations

import argparse
import sys

import torch
from device import device_of, now
from side_by_side import against_transformers, findings, open_peer, options_of, serve, verdict

from model import MiniDeepSeek
from model.decoding.engine import Engine
from model.decoding.scheduler import Request
from training.machine import DTYPES

LOCK_STEP = "lock step"
PEERS = (LOCK_STEP, "eager")


def main() -> None:
    options = options_of(__doc__, PEERS, requests=128, slots=32, prompt=32, new=128)
    if options.worker:
        work(options)
        return
    _, ours, peers = against_transformers(__file__, options)
    wanted = lengths(options)
    for peer in peers:
        peer.name = f"ours in {LOCK_STEP}" if peer.name.endswith(LOCK_STEP) else f"{peer.name} in {LOCK_STEP}"
    shape = f"{options.requests} prompts of {options.prompt} tokens, {options.slots} at a time"
    answers = f"completions of {sum(wanted) / len(wanted):.0f} tokens on average, {max(wanted)} at most"
    found = findings(
        f"continuous batching, {options.preset}, {options.dtype}; {shape}; {answers}; medians of {options.rounds}",
        [ours, *peers],
    )
    found.verdicts = [verdict(ours, peer, "tokens/s") for peer in peers]
    found.show({"tokens/s": "{:,.0f}", "memory_mb": "{:,.0f}"})
    found.save(options.json)


def lengths(options: argparse.Namespace) -> list[int]:
    """Completion lengths with a long tail: exponential, a quarter of the longest on average."""
    drawn = torch.empty(options.requests).exponential_(4, generator=torch.Generator().manual_seed(0))
    return (drawn * options.new).ceil().clamp(1, options.new).long().tolist()


def work(options: argparse.Namespace) -> None:
    """Complete all requests in this process, once for each line on stdin; only tokens that were asked for count."""
    device, generator = device_of(options.device), torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 6400, (options.requests, options.prompt), generator=generator).to(device)
    wanted, slots = lengths(options), options.slots
    if options.worker == "eager":
        model = open_peer(options.folder, options.worker, DTYPES[options.dtype])
        model.generation_config.eos_token_id = None
    else:
        model = MiniDeepSeek.from_pretrained(options.folder, dtype=DTYPES[options.dtype])
    model = model.to(device).eval()

    def waiting() -> None:
        for start in range(0, options.requests, slots):
            part, longest = prompts[start : start + slots], max(wanted[start : start + slots])
            if options.worker == "eager":
                mask = torch.ones_like(part)
                model.generate(
                    part, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest, do_sample=False
                )
            else:
                model.generate(part, max_new_tokens=longest)

    def continuous() -> None:
        requests = [Request(ids, new) for ids, new in zip(prompts.tolist(), wanted, strict=True)]
        for _ in Engine(model, slots, options.prompt + options.new).run(requests):
            pass

    def measure() -> dict[str, float]:
        start = now(device)
        with torch.inference_mode():
            (continuous if options.worker == "ours" else waiting)()
        return {"tokens/s": sum(wanted) / (now(device) - start)}

    serve(measure, device, warm_up=1)


if __name__ == "__main__":
    sys.exit(main())
