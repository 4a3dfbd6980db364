"""What a configuration costs, computed from it alone: parameters, cache and FLOPs.

python LMConfig.py                                              what each preset costs
python LMConfig.py --preset 26m --num_hidden_layers 6           a preset with other values, beside it
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, fields
from typing import Any

from errors import command_line
from LMConfig import PRESETS, ConfigError, LMConfig, did_you_mean


@dataclass(frozen=True)
class Costs:
    """Attributes:
    total: parameters of the main model (embedding and head included, MTP not).
    activated: parameters that one token uses: K of the E routed experts, the shared ones and everything dense.
    mtp: parameters that multi-token prediction adds.
    cache_bytes: latent cache of one token in bfloat16, all layers.
    mha_cache_bytes: what multi-head attention with the same heads would cache: keys and values of every head.
    products: training FLOPs of one token (forward and backward, MTP included) in products with weights.
    flops: the same with attention's products at sequence length `time`.
    """

    total: int
    activated: int
    mtp: int
    cache_bytes: int
    mha_cache_bytes: int
    products: int
    flops: int


def count(config: LMConfig, time: int = 512) -> Costs:
    """Compute a configuration's costs; `time` is the sequence length that attention's FLOPs depend on."""
    layers, depths, heads = config.num_hidden_layers, config.num_nextn_predict_layers, config.num_attention_heads
    hidden, dense = config.hidden_size, config.first_k_dense_replace
    embedding = config.vocab_size * hidden
    expert = 3 * hidden * config.moe_intermediate_size
    # The router's bias is counted as the released figures do: not at all.
    router_and_shared = config.n_routed_experts * hidden + config.n_shared_experts * expert
    unused = (config.n_routed_experts - config.num_experts_per_tok) * expert  # of one MoE layer, by one token
    layer = attention_parameters(config) + 2 * hidden
    moe_layer = layer + router_and_shared + config.n_routed_experts * expert
    total = embedding * (1 if config.tie_word_embeddings else 2) + hidden
    total += dense * (layer + 3 * hidden * config.intermediate_size) + (layers - dense) * moe_layer
    mtp = depths * (moe_layer + 2 * hidden * hidden + 3 * hidden)  # eh_proj; enorm, hnorm and the head's norm
    # 6 FLOPs a weight in a product (2 forward, 4 backward; PaLM, appendix B). Looking up an embedding is none, and
    # MTP runs the shared head once more for each depth.
    products = total + mtp - (layers - dense + depths) * unused
    products += depths * embedding - (0 if config.tie_word_embeddings else embedding)
    head_sizes = config.qk_head_dim + config.v_head_dim
    return Costs(
        total=total,
        activated=total - (layers - dense) * unused,
        mtp=mtp,
        cache_bytes=2 * layers * (config.kv_lora_rank + config.qk_rope_head_dim),
        mha_cache_bytes=2 * layers * heads * head_sizes,
        products=6 * products,
        flops=6 * products + 3 * (layers + depths) * heads * time * head_sizes,  # causal: half of the positions
    )


def attention_parameters(config: LMConfig) -> int:
    """Count the parameters of one MLA block, its inner norms and biases included."""
    hidden, heads, query = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    latent, values = config.kv_lora_rank + config.qk_rope_head_dim, heads * config.v_head_dim
    bias = latent + hidden + (query or 0) if config.attention_bias else 0
    queries = heads * config.qk_head_dim
    queries = hidden * queries if query is None else hidden * query + query + query * queries
    keys_and_values = config.kv_lora_rank * (1 + heads * config.qk_nope_head_dim + values)
    return queries + hidden * latent + keys_and_values + values * hidden + bias


def activation_numbers(config: LMConfig) -> int:
    """Count the numbers that one token of training passes from product to product in the layers, MTP's included."""
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.qk_head_dim
    kv = heads * (config.qk_nope_head_dim + config.v_head_dim)
    rank, latent = config.q_lora_rank or 0, config.kv_lora_rank + config.qk_rope_head_dim
    query = hidden + rank + rank + heads * width if rank else hidden + heads * width
    attention = query + hidden + latent + config.kv_lora_rank + kv + heads * config.v_head_dim + hidden
    attention += heads * (2 * width + 2 * config.v_head_dim)  # the fused kernel: q, k and v in, the output out
    dense = 2 * hidden + 3 * config.intermediate_size
    chosen = config.num_experts_per_tok + config.n_shared_experts
    moe = chosen * (2 * hidden + 3 * config.moe_intermediate_size)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    return layers * attention + config.first_k_dense_replace * dense + (layers - config.first_k_dense_replace) * moe


def human(number: float, unit: str = "") -> str:
    """1234567 -> '1.23 M'."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.4g} {letter}{unit}"
    return f"{number:.4g} {unit}".rstrip()


def table(configs: dict[str, LMConfig], time: int = 512) -> str:
    """Return one line a configuration, for `python LMConfig.py`."""
    flops = f"train FLOPs/token at {time}"
    rows = [("preset", "total", "activated", "MTP adds", "cache/token", "MHA would", "ratio", flops)]
    for name, config in configs.items():
        costs = count(config, time)
        parameters = map(human, (costs.total, costs.activated, costs.mtp))
        caches = human(costs.cache_bytes, "B"), human(costs.mha_cache_bytes, "B")
        ratio = f"{costs.mha_cache_bytes / costs.cache_bytes:.1f}x"
        rows.append((name, *parameters, *caches, ratio, human(costs.flops)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    """Print the size and the cost of every preset, or of one beside the same with other values."""
    parser = argparse.ArgumentParser(
        prog="LMConfig.py",
        usage="LMConfig.py [--preset NAME] [--FIELD VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--preset", default=None, help=f"one of {', '.join(PRESETS)}; 64m where only fields are given")
    for f in fields(LMConfig):
        parser.add_argument(f"--{f.name}", metavar=str(f.type).replace(" | None", ""), help=f"{f.default} in 64m")
    try:
        given, unknown = parser.parse_known_args()
    except argparse.ArgumentError as error:
        raise ConfigError(f"LMConfig.py: {error}; see --help") from None
    for argument in unknown:
        name = argument.removeprefix("--").partition("=")[0]
        near = did_you_mean(name, {"preset", *(f.name for f in fields(LMConfig))})
        raise ConfigError(f"{argument}: no such option{near}; see --help")
    values = {name: value for name, value in vars(given).items() if value is not None}
    name = values.pop("preset", None)
    configs = {one: LMConfig.preset(one) for one in (PRESETS if name is None and not values else [name or "64m"])}
    if values:
        changes = {key: _parsed(key, value) for key, value in values.items()}
        changed = LMConfig.preset(name or "64m", **changes)
        configs[", ".join(f"{key} {value}" for key, value in changes.items())] = changed
    print(table(configs))


def _parsed(name: str, text: str) -> Any:
    """Return the value of a field as the command line has it: JSON, or the text itself where the field is one."""
    kind = next(str(f.type) for f in fields(LMConfig) if f.name == name)
    if kind == "str":
        return text
    try:
        return json.loads(text.lower() if text in ("True", "False", "None", "none") else text)
    except (ValueError, RecursionError):
        raise ConfigError(f"--{name} {text}: not a value of this field; give {kind}") from None


if __name__ == "__main__":
    command_line(main)
