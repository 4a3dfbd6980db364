"""Where a training step's time goes: torch's profiler over bench/train_step.py's step, by kinds and by products.

python bench/profile_step.py [--preset 64m] [--dtype bf16] [--rows 8] [--length 512] [--steps 3] [--products 12]
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import wraps

import torch
from device import now
from torch.profiler import ProfilerActivity, profile, record_function

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.kernels import grouped, products
from training.losses import NextTokenLoss
from training.machine import DTYPES, autocast, measured_peak
from training.optim.build import OptimSettings, build_optimizer

PRODUCTS = r"aten::(mm|addmm)$|mkldnn::_linear_pointwise|^C product"
# The first that fits names the kind of an event; the times are the events' own, without what they call.
KINDS = {
    "products": PRODUCTS,
    "vocabulary's softmax": r"softmax|_LinearCrossEntropy",
    "attention": r"CausalAttention|ChunkedAttention|aten::(bmm|baddbmm)$",
    "SwiGLU": r"SwiGLU|silu",
    "RMSNorm": r"RMSNorm|rms_norm",
    "AdamW, clipping": r"adamw|norm|_foreach|Optimizer|aten::zero_?$",
    "gathering rows": r"Dispatch|Combine|Permute|index|gather|scatter|sort|embedding",
    "casts and copies": r"aten::(copy_|_to_copy|to|clone|contiguous|fill_)$",
    "adding, concatenating": r"aten::(add_?|cat|sum|sub_?)$",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="64m")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    for name, default in {"rows": 8, "length": 512, "steps": 3, "products": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    dtype, device = DTYPES[options.dtype], torch.device("cpu")
    torch.manual_seed(0)
    model = MiniDeepSeek(LMConfig.preset(options.preset, num_nextn_predict_layers=0))
    vocab = model.config.vocab_size
    tokens, loss = torch.randint(0, vocab, (options.rows, options.length + 1)), NextTokenLoss(mtp=False)
    optimizer = build_optimizer(model, OptimSettings(lr=1e-4))

    def step() -> float:
        start = now(device)
        with autocast(dtype, device):
            total, labels, _ = loss(model, {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]})
        (total / labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return (now(device) - start) * 1e3

    products.product_in_c = watched(products.product_in_c, lambda out, a, b: (*a.shape, len(b)))
    products.gradient_in_c = watched(products.gradient_in_c, lambda to, grad, x: (len(to), *x.shape))
    for name in ("product", "product_back"):
        setattr(grouped, name, watched(getattr(grouped, name), lambda x, weight, _: (len(x), *weight.shape[1:])))
    grouped.all_gradients_into = watched(grouped.all_gradients_into, lambda to, grad, x, _: (len(x), *to.shape[1:]))
    for _ in range(2):
        step()
    plain = sorted(step() for _ in range(options.steps))[options.steps // 2]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        traced = sum(step() for _ in range(options.steps)) / options.steps
    events = profiler.key_averages(group_by_input_shape=True)
    square = torch.randn(2048, 2048).to(dtype)
    seconds = min(timed(lambda: products.product(square, square)) for _ in range(10))
    peak = max(measured_peak(dtype, device), 2 * 2048**3 / seconds)  # of the libraries at hand the faster
    print(
        f"{options.preset} without MTP, {options.rows} x {options.length} tokens, {options.dtype}, "
        f"{torch.get_num_threads()} threads; {plain:,.0f} ms a step, {traced:,.0f} under the profiler; "
        f"large products reach {peak / 1e9:,.0f} GFLOP/s\n"
    )
    print_kinds(events, options.steps)
    known = {size for p in model.parameters() for size in p.shape} | {tokens[:, 1:].numel()}
    print_products(events, options.steps, peak, options.products, known)


def print_kinds(events: list, steps: int) -> None:
    """Milliseconds of a step by kind, and the largest of the rest by name."""
    spent, rest = Counter(), Counter()
    for event in events:
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "rest")
        spent[kind] += event.self_cpu_time_total / 1e3 / steps
        if kind == "rest":
            rest[event.key] += event.self_cpu_time_total / 1e3 / steps
    kinds = [*KINDS, "rest"]
    print(f"| {' | '.join(kinds)} |\n|{'---|' * len(kinds)}")
    print(f"| {' | '.join(f'{spent[kind]:.0f}' for kind in kinds)} |\n")
    print("rest:", ", ".join(f"{name} {ms:.0f}" for name, ms in rest.most_common(8)), "\n")


def print_products(events: list, steps: int, peak: float, many: int, known: set[int]) -> None:
    """The products by the time that they lose against the peak; experts' numbers of rows are all called `rows`."""
    spent: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for event in events:
        if not re.search(PRODUCTS, event.key):
            continue
        if event.key.startswith("C product"):
            way, sizes = "C", [int(size) for size in event.key.split()[2].split("x")]
        else:
            left, right = [shape for shape in event.input_shapes if len(shape) == 2][:2]
            # oneDNN's operation takes the second matrix as a layer holds it, (out, in).
            way, sizes = "torch", [*left, right[0] if "linear" in event.key else right[1]]
        key = (way, " x ".join(str(size) if size in known else "rows" for size in sizes))
        for place, value in enumerate(
            (event.count, event.self_cpu_time_total / 1e6, 2 * math.prod(sizes) * event.count)
        ):
            spent[key][place] += value / steps
    lines = sorted(
        ((s - flops / peak, way, shape, n, s, flops) for (way, shape), (n, s, flops) in spent.items()), reverse=True
    )
    print("| product | by | times | ms | GFLOP/s | ms lost |\n|---|---|---|---|---|---|")
    for lost, way, shape, times, seconds, flops in lines[:many]:
        print(
            f"| {shape} | {way} | {times:.0f} | {seconds * 1e3:.1f} | {flops / seconds / 1e9:.0f} | {lost * 1e3:.1f} |"
        )
    total, work = sum(line[4] for line in lines), sum(line[5] for line in lines)
    print(f"| all | | | {total * 1e3:.0f} | {work / total / 1e9:.0f} | {(total - work / peak) * 1e3:.0f} |")


def watched(function: Callable, sizes: Callable) -> Callable:
    """The function under a name in the profile that tells the three sizes of its product."""

    @wraps(function)
    def call(*tensors: torch.Tensor, **options: bool) -> torch.Tensor:
        with record_function(f"C product {'x'.join(map(str, sizes(*tensors)))}"):
            return function(*tensors, **options)

    return call


def timed(function: Callable) -> float:
    start = now(torch.device("cpu"))
    function()
    return now(torch.device("cpu")) - start


if __name__ == "__main__":
    sys.exit(main())
