"""Greedy decoding against transformers' DeepseekV3, and llama.cpp, on the same weights, interleaved.

python bench/decode.py [--preset 64m] [--dtype bf16] [--batch 1] [--prompt 128] [--new 64] [--rounds 5]
python bench/decode.py --quantize int8 [--peers]        ours with 8-bit weights too [and no transformers]
python bench/decode.py --peers llama.cpp                llama.cpp on our GGUF, one prompt; llama.cpp/q8_0: in 8 bits

llama.cpp is left out where llama_cpp is not installed: pip install llama-cpp-python.
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from pathlib import Path

import harness
import torch
from harness import MEMORY, SPEED, Verdict

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.cache import LatentCache
from model.checkpoint.gguf_export import export_gguf
from model.costs import count
from model.decoding.generate import stream
from model.decoding.sampling import Sampling
from text.tokenizer import Tokenizer
from training.adapters.frozen import shrink_frozen
from training.machine import DTYPES

PREFILL, CACHED = "prefill tokens/s", "cached"
LLAMA = "llama.cpp"
GGUF_TYPES = {"bf16": "bf16", "fp32": "f32"}


def measured_bandwidth(device: torch.device, megabytes: int = 1024, times: int = 5) -> float:
    """Return bytes a second that the GPU, or all threads, read from memory, best of several."""
    numbers = torch.ones(megabytes * 2**20 // 4, device=device)
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        numbers.sum().item()
        best = min(best, time.perf_counter() - start)
    return numbers.numel() * 4 / best


def weights_read(config: LMConfig, batch: int) -> float:
    """Return how many weights a step reads: all but the embedding, and of the experts those that `batch` tokens choose,
    were all equally likely: E (1 - (1 - K/E)^batch)."""
    experts, chosen, hidden = config.n_routed_experts, config.num_experts_per_tok, config.hidden_size
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * hidden
    distinct = experts * (1 - (1 - chosen / experts) ** batch)
    layers = config.num_hidden_layers - config.first_k_dense_replace
    return count(config).activated - lookup + layers * (distinct - chosen) * 3 * hidden * config.moe_intermediate_size


def main() -> None:
    parser = harness.parser_of(__doc__, batch=1, prompt=128, new=64)
    harness.add_peers(parser, "eager", "batched_mm", "grouped_mm")
    parser.add_argument("--quantize", choices=["int8"], help="measure ours with weights in 8 bits too")
    parser.add_argument("--tokenizer", default="out/demo/tokenizer", help="folder of the one that a GGUF file needs")
    options = parser.parse_args()
    if find_spec("llama_cpp") is None or options.batch > 1:
        options.peers = [peer for peer in options.peers if not peer.startswith(LLAMA)]
    if options.worker:
        work(options)
        return
    config = LMConfig.preset(options.preset, num_nextn_predict_layers=0)
    workers = {"ours": "ours", **({f"ours {options.quantize}": options.quantize} if options.quantize else {})}
    with harness.checkpoint(config) as folder:
        for peer in options.peers:
            workers[peer if peer.startswith(LLAMA) else f"transformers {peer}"] = peer
            if peer.startswith(LLAMA):
                Tokenizer.from_folder(options.tokenizer).save(folder)
                export_gguf(Path(folder), gguf_of(folder, peer), peer.partition("/")[2] or GGUF_TYPES[options.dtype])
        found = harness.measured(workers, options.rounds, folder)
    ours, baselines = found[0], [one for one in found if one.name.startswith("transformers")]
    verdicts = [Verdict.between(found[1], ours, SPEED, f"{SPEED} in 8 bits")] if options.quantize else []
    best = {key: max(baselines, key=lambda one: one.median(key)) for key in (SPEED, PREFILL)} if baselines else {}
    verdicts += [Verdict.between(ours, one, key) for key, one in best.items()]
    for one in found:
        if one.name.startswith(LLAMA):
            mine = found[1] if options.quantize and "/" in one.name else ours
            verdicts += [Verdict.between(mine, one, key) for key in (SPEED, PREFILL)]
    read = weights_read(config, options.batch) * DTYPES[options.dtype].itemsize
    expanded = count(config).mha_cache_bytes // 2 // config.num_hidden_layers
    theirs = f", transformers {best[SPEED].median(CACHED):,.0f}" if best else ""
    bandwidth = measured_bandwidth(harness.device_of(options.device))
    share = ours.median(SPEED) / options.batch * read / bandwidth
    facts = {
        "weights that a step reads": f"{read / 1e6:,.0f} MB",
        "cached numbers a token and layer": f"{ours.median(CACHED):,.0f}{theirs}; expanded: {expanded:,}",
        "memory bandwidth": f"{bandwidth / 1e9:,.1f} GB/s, {share:.0%} of it for weights, some of which stay in the "
        "processor's cache",
    }
    shape = f"batch {options.batch}, prompt {options.prompt}, {options.new} new tokens, {options.dtype}, greedy"
    title = f"decoding, {options.preset}, {shape}; medians of {options.rounds}"
    columns = {SPEED: "{:,.1f}", PREFILL: "{:,.0f}", MEMORY: "{:,.0f}"}
    harness.report(title, found, columns, verdicts, facts, options.json)


def gguf_of(folder: str, peer: str) -> Path:
    """Return the file that a llama.cpp peer reads."""
    return Path(folder) / f"{peer.replace('/', '-')}.gguf"


def work(options: argparse.Namespace) -> None:
    """Decode in this process, once for each line on stdin. The first token's time is the prefill's."""
    device, dtype = harness.device_of(options.device), DTYPES[options.dtype]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 6400, (options.batch, options.prompt), generator=generator).to(device)
    if options.worker in ("ours", "int8"):
        model = MiniDeepSeek.from_pretrained(options.folder).requires_grad_(False)
        if options.worker == "int8":
            shrink_frozen(model, "int8", dtype)
        model = model.to(device, dtype).eval()
        cached = LatentCache(model.config, 1, 1, torch.float32, device).latents[0].numel()

        def times() -> list[float]:
            tokens = stream(model, prompt, options.new, Sampling(temperature=0))
            return [harness.now(device) for _ in tokens]
    elif options.worker.startswith(LLAMA):
        from llama_cpp import Llama

        file, threads = gguf_of(options.folder, options.worker), torch.get_num_threads()
        room = {"n_ctx": options.prompt + options.new + 1, "n_batch": options.prompt}
        llama = Llama(str(file), n_threads=threads, n_threads_batch=threads, verbose=False, **room)
        cached = 0

        def times() -> list[float]:
            llama.reset()
            made = llama.generate(prompt[0].tolist(), top_k=1, temp=0.0)
            return [harness.now(device) for _, _ in zip(range(options.new), made, strict=False)]
    else:
        model = harness.open_baseline(options.folder, options.worker, dtype).to(device).eval()
        model.generation_config.eos_token_id = None
        layer = model(prompt[:1, :1], use_cache=True).past_key_values.layers[0]
        cached = layer.keys.numel() + layer.values.numel()
        shape = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
        shape |= {"max_new_tokens": options.new, "min_new_tokens": options.new}

        def times() -> list[float]:
            found: list[float] = []

            def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                found.append(harness.now(device))
                return torch.zeros(len(ids), dtype=torch.bool, device=device)

            model.generate(prompt, stopping_criteria=[note], **shape)
            return found

    def measure() -> dict[str, float]:
        start = harness.now(device)
        with torch.inference_mode():
            first, *_, last = times()
        speed = options.batch * (options.new - 1) / (last - first)
        return {SPEED: speed, PREFILL: prompt.numel() / (first - start), CACHED: cached}

    harness.serve(measure, device, warm_up=1)


if __name__ == "__main__":
    main()
