"""Greedy decoding against transformers' DeepseekV3 on the same weights, in turn.

python bench/decode.py [--preset 64m] [--dtype bf16] [--batch 1] [--prompt 128] [--new 64] [--rounds 5]
python bench/decode.py --static                         ours with CUDA graphs
python bench/decode.py --quantize int8 [--peers]        ours with 8-bit weights too [and no transformers]
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import torch
from device import device_of, now
from roofline import Network
from side_by_side import against_transformers, findings, open_peer, parser_of, serve, verdict

from model import MiniDeepSeek
from model.cache import LatentCache
from model.costs import count
from model.decoding.generate import stream
from model.decoding.sampling import Sampling
from training.adapters.frozen import shrink_frozen
from training.machine import DTYPES

PEERS = ("eager", "batched_mm", "grouped_mm")
CACHED = "cached"


def measured_bandwidth(device: torch.device, megabytes: int = 1024, times: int = 5) -> float:
    """Return bytes a second that the GPU, or all threads, read from memory, best of several."""
    numbers = torch.ones(megabytes * 2**20 // 4, device=device)
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        numbers.sum().item()
        best = min(best, time.perf_counter() - start)
    return numbers.numel() * 4 / best


def main() -> None:
    parser = parser_of(__doc__, PEERS, batch=1, prompt=128, new=64)
    parser.add_argument("--static", action="store_true", help="ours in steps of one shape, on CUDA as a graph")
    parser.add_argument("--quantize", choices=["int8"], help="measure ours with weights in 8 bits too")
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    config, ours, peers = against_transformers(__file__, options, [options.quantize] if options.quantize else [])
    found = findings(
        f"decoding, {options.preset}, batch {options.batch}, prompt {options.prompt}, {options.new} new tokens, "
        f"{options.dtype}, greedy; medians of {options.rounds}",
        [ours, *peers],
    )
    smaller, peers = (peers[:1], peers[1:]) if options.quantize else ([], peers)
    found.verdicts = [replace(verdict(each, ours, "tokens/s"), quantity="tokens/s in 8 bits") for each in smaller]
    if peers:
        best = max(peers, key=lambda peer: peer.median("tokens/s"))
        fastest = max(peers, key=lambda peer: peer.median("prefill tokens/s"))
        found.verdicts += [verdict(ours, best, "tokens/s"), verdict(ours, fastest, "prefill tokens/s")]
    costs = count(config)
    read = Network.of(config, options.prompt).read_weights(options.batch) * DTYPES[options.dtype].itemsize
    found.facts["weights that a step reads"] = f"{read / 1e6:,.0f} MB"
    expanded = costs.mha_cache_bytes // 2 // config.num_hidden_layers
    theirs = f", transformers {best.median(CACHED):,.0f}" if peers else ""
    found.facts["cached numbers a token and layer"] = (
        f"{ours.median(CACHED):,.0f}{theirs}; expanded keys and values: {expanded:,}"
    )
    bandwidth = measured_bandwidth(device_of(options.device))
    share = ours.median("tokens/s") / options.batch * read / bandwidth
    found.facts["memory bandwidth"] = (
        f"{bandwidth / 1e9:,.1f} GB/s, {share:.0%} of it for weights, some of which stay in the processor's cache"
    )
    found.show({"tokens/s": "{:,.1f}", "prefill tokens/s": "{:,.0f}", "memory_mb": "{:,.0f}"})
    found.save(options.json)


def work(options: argparse.Namespace) -> None:
    """Decode in this process, once for each line on stdin. The first token's time is the prefill's."""
    device, dtype = device_of(options.device), DTYPES[options.dtype]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 6400, (options.batch, options.prompt), generator=generator).to(device)
    if options.worker in ("ours", "int8"):
        model = MiniDeepSeek.from_pretrained(options.folder).requires_grad_(False)
        if options.worker == "int8":
            shrink_frozen(model, "int8", dtype)
        model = model.to(device, dtype).eval()
        cache = LatentCache(model.config, 1, 1, torch.float32, device)
        held = cache.latents[0].numel()

        def times() -> list[float]:
            tokens = stream(model, prompt, options.new, Sampling(temperature=0), static=options.static)
            return [now(device) for _ in tokens]
    else:
        model = open_peer(options.folder, options.worker, dtype).to(device).eval()
        model.generation_config.eos_token_id = None
        cache = model(prompt[:1, :1], use_cache=True).past_key_values.layers[0]
        held = cache.keys.numel() + cache.values.numel()
        shape = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": options.new, "do_sample": False}
        shape["min_new_tokens"] = options.new

        def times() -> list[float]:
            found: list[float] = []

            def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                found.append(now(device))
                return torch.zeros(len(ids), dtype=torch.bool, device=device)

            model.generate(prompt, stopping_criteria=[note], **shape)
            return found

    def measure() -> dict[str, float]:
        start = now(device)
        with torch.inference_mode():
            first, *_, last = times()
        speed = options.batch * (options.new - 1) / (last - first)
        return {"tokens/s": speed, "prefill tokens/s": prompt.numel() / (first - start), CACHED: held}

    serve(measure, device, warm_up=1)


if __name__ == "__main__":
    sys.exit(main())
