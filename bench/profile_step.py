"""Where a training step's time goes: torch's profiler over bench/train_step.py's step, by kinds of work.

python bench/profile_step.py [--preset 64m] [--dtype bf16] [--rows 8] [--length 512] [--steps 3]
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from statistics import median

import harness
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from train_step import PASSES, UPDATE, own_step

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.kernels import grouped, products
from training.machine import DTYPES, measured_peak

# The first that fits names the kind of an event; the times are the events' own, without what they call.
KINDS = {
    "products": r"aten::(mm|addmm)$|mkldnn::_linear_pointwise|^C product",
    "vocabulary's softmax": r"softmax|_LinearCrossEntropy",
    "attention": r"CausalAttention|ChunkedAttention|aten::(bmm|baddbmm)$",
    "SwiGLU": r"SwiGLU|silu",
    "RMSNorm": r"RMSNorm|rms_norm",
    "AdamW, clipping": r"adamw|norm|_foreach|Optimizer|aten::zero_?$",
    "gathering rows": r"Dispatch|Combine|Permute|index|gather|scatter|sort|embedding",
    "casts and copies": r"aten::(copy_|_to_copy|to|clone|contiguous|fill_)$",
    "adding, concatenating": r"aten::(add_?|cat|sum|sub_?)$",
}
IN_C = {products: ("product_in_c", "gradient_in_c"), grouped: ("product", "all_gradients_into")}


def main() -> None:
    options = harness.parser_of(__doc__, rows=8, length=512, steps=3).parse_args()
    torch.manual_seed(0)
    for module, names in IN_C.items():
        for name in names:
            setattr(module, name, named(getattr(module, name)))
    step = own_step(MiniDeepSeek(LMConfig.preset(options.preset, num_nextn_predict_layers=0)), options)

    def milliseconds() -> list[float]:
        results = [step() for _ in range(options.steps)]
        return [1e3 * (result[PASSES] + result[UPDATE]) for result in results]

    milliseconds()
    plain = median(milliseconds())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        traced = median(milliseconds())
    peak = measured_peak(DTYPES[options.dtype], harness.device_of(options.device))
    print(
        f"{options.preset} without MTP, {options.rows} x {options.length} tokens, {options.dtype}\n"
        f"{harness.machine()}; "
        f"{plain:,.0f} ms a step, {traced:,.0f} under the profiler; large products reach {peak / 1e9:,.0f} GFLOP/s\n"
    )
    spent, rest = Counter(), Counter()
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "rest")
        spent[kind] += event.self_cpu_time_total / 1e3 / options.steps
        if kind == "rest":
            rest[event.key] += event.self_cpu_time_total / 1e3 / options.steps
    kinds = [*KINDS, "rest"]
    print(f"| {' | '.join(kinds)} |\n|{'---|' * len(kinds)}")
    print(f"| {' | '.join(f'{spent[kind]:.0f}' for kind in kinds)} |\n")
    print("rest:", ", ".join(f"{name} {ms:.0f}" for name, ms in rest.most_common(8)))


def named(function: Callable) -> Callable:
    """Return the function under a name in the profile, which knows nothing of C."""

    def call(*given: object, **options: object) -> object:
        with record_function("C product"):
            return function(*given, **options)

    return call


if __name__ == "__main__":
    main()
