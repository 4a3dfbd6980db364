"""What a configuration costs: parameters, cache and FLOPs, counted on the meta device without memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from LMConfig import LMConfig
from model.transformer import MiniDeepSeek


@dataclass(frozen=True)
class Costs:
    """Attributes:
    total: parameters of the main model (embedding and head included, MTP not).
    activated: parameters that one token uses: K of the E routed experts, the shared ones and everything dense.
    mtp: parameters that multi-token prediction adds.
    cache_bytes: latent cache of one token in bfloat16, all layers.
    mha_cache_bytes: what multi-head attention with the same heads would keep: keys and values of every head.
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
    """Count a configuration's costs; `time` is the sequence length that attention's FLOPs depend on."""
    plain = replace(config, num_nextn_predict_layers=0)
    total, activated = _parameters(plain)
    all_total, all_activated = _parameters(config)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    embedding = config.vocab_size * config.hidden_size
    # 6 FLOPs a weight in a product (2 forward, 4 backward; PaLM, appendix B). Looking up an embedding is none, and
    # MTP runs the shared head once more for each depth.
    products = all_activated - (0 if config.tie_word_embeddings else embedding)
    products += config.num_nextn_predict_layers * embedding
    attention = (layers + config.num_nextn_predict_layers) * heads * time * (config.qk_head_dim + config.v_head_dim)
    return Costs(
        total=total,
        activated=activated,
        mtp=all_total - total,
        cache_bytes=2 * layers * (config.kv_lora_rank + config.qk_rope_head_dim),
        mha_cache_bytes=2 * layers * heads * (config.qk_head_dim + config.v_head_dim),
        products=6 * products,
        flops=6 * products + 6 * attention // 2,  # causal: half of the positions on average
    )


def activation_numbers(config: LMConfig) -> int:
    """Numbers that one token of training passes from product to product in the layers, MTP's included."""
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


def _parameters(config: LMConfig) -> tuple[int, int]:
    """Total and activated parameters; the router's bias is counted as the released figures do not: not at all."""
    with torch.device("meta"):
        model = MiniDeepSeek(config)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = config.num_experts_per_tok / config.n_routed_experts
    return total, total - routed + round(routed * share)


def human(number: float, unit: str = "") -> str:
    """1234567 -> '1.23 M'."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.4g} {letter}{unit}"
    return f"{number:.4g} {unit}".rstrip()


def table(configs: dict[str, LMConfig], time: int = 512) -> str:
    """One line a configuration, for `python LMConfig.py`."""
    rows = [
        (
            "preset",
            "total",
            "activated",
            "MTP adds",
            "cache/token",
            "MHA would",
            "ratio",
            f"train FLOPs/token at {time}",
        )
    ]
    for name, config in configs.items():
        costs = count(config, time)
        rows.append(
            (
                name,
                human(costs.total),
                human(costs.activated),
                human(costs.mtp),
                human(costs.cache_bytes, "B"),
                human(costs.mha_cache_bytes, "B"),
                f"{costs.mha_cache_bytes / costs.cache_bytes:.1f}x",
                human(costs.flops),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
