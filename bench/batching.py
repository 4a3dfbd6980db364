"""Many prompts of one length with completions of very different lengths: continuous batching against batches that wait.

Ours keeps `slots` sequences running and fills a free one at once. Beside it stand ours in lock step and transformers'
`generate` on the same weights, in batches of `slots` that each last until their longest completion ends.

python bench/batching.py [--preset demo] [--requests 128] [--slots 32] [--prompt 32] [--new 128] [--rounds 5]
"""

from __future__ import annotations

import argparse

import harness
import torch
from harness import MEMORY, SPEED, Verdict

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.decoding.engine import Engine
from model.decoding.scheduler import Request
from training.machine import DTYPES

LOCK_STEP = "lock step"


def main() -> None:
    parser = harness.parser_of(__doc__, requests=128, slots=32, prompt=32, new=128)
    harness.add_peers(parser, LOCK_STEP, "eager")
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    names = {
        f"{'ours' if peer == LOCK_STEP else f'transformers {peer}'} in {LOCK_STEP}": peer for peer in options.peers
    }
    with harness.checkpoint(LMConfig.preset(options.preset, num_nextn_predict_layers=0)) as folder:
        ours, *baselines = harness.measured({"ours": "ours", **names}, options.rounds, folder)
    new = lengths(options)
    shape = f"{options.requests} prompts of {options.prompt} tokens, {options.slots} at a time"
    answers = f"completions of {sum(new) / len(new):.0f} tokens on average, {max(new)} at most"
    title = f"continuous batching, {options.preset}, {options.dtype}; {shape}; {answers}; medians of {options.rounds}"
    verdicts = [Verdict.between(ours, one, SPEED) for one in baselines]
    harness.report(title, [ours, *baselines], {SPEED: "{:,.0f}", MEMORY: "{:,.0f}"}, verdicts, {}, options.json)


def lengths(options: argparse.Namespace) -> list[int]:
    """Return completion lengths with a long tail: exponential, a quarter of the longest on average."""
    drawn = torch.empty(options.requests).exponential_(4, generator=torch.Generator().manual_seed(0))
    return (drawn * options.new).ceil().clamp(1, options.new).long().tolist()


def work(options: argparse.Namespace) -> None:
    """Complete all requests in this process, once for each line on stdin; only tokens that were asked for count."""
    device, generator = harness.device_of(options.device), torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 6400, (options.requests, options.prompt), generator=generator).to(device)
    new, slots = lengths(options), options.slots
    if options.worker in ("ours", LOCK_STEP):
        model = MiniDeepSeek.from_pretrained(options.folder, dtype=DTYPES[options.dtype])
    else:
        model = harness.open_baseline(options.folder, options.worker, DTYPES[options.dtype])
        model.generation_config.eos_token_id = None
    model = model.to(device).eval()

    def waiting() -> None:
        for start in range(0, options.requests, slots):
            part, longest = prompts[start : start + slots], max(new[start : start + slots])
            shape = {"attention_mask": torch.ones_like(part), "min_new_tokens": longest, "do_sample": False}
            model.generate(part, max_new_tokens=longest, **({} if options.worker == LOCK_STEP else shape))

    def continuous() -> None:
        requests = [Request(ids, most) for ids, most in zip(prompts.tolist(), new, strict=True)]
        for _ in Engine(model, slots, options.prompt + options.new).run(requests):
            pass

    def measure() -> dict[str, float]:
        start = harness.now(device)
        with torch.inference_mode():
            (continuous if options.worker == "ours" else waiting)()
        return {SPEED: sum(new) / (harness.now(device) - start)}

    harness.serve(measure, device, warm_up=1)


if __name__ == "__main__":
    main()
