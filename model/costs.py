"""What a configuration costs, computed from it alone: parameters, cache and FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from LMConfig import LMConfig


@dataclass(frozen=True)
class Costs:
    """Attributes:
    total: parameters of the main model (embedding and head included, MTP not).
    activated: parameters that one token uses: K of the E routed experts, the shared ones and everything dense.
    mtp: parameters that multi-token prediction adds.
    cache_bytes: what attention caches of one token in bfloat16, all layers.
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
        cache_bytes=2 * layers * config.cache_width,
        mha_cache_bytes=2 * layers * heads * head_sizes,
        products=6 * products,
        flops=6 * products + 3 * (layers + depths) * heads * time * head_sizes,  # causal: half of the positions
    )


def attention_parameters(config: LMConfig) -> int:
    """Count the parameters of one block of attention, its inner norms and biases included."""
    hidden, heads, query = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    if not config.kv_lora_rank:  # MHA or GQA
        inner = heads * config.qk_head_dim + config.cache_width
        return hidden * (inner + heads * config.v_head_dim) + (inner + hidden if config.attention_bias else 0)
    latent, values = config.kv_lora_rank + config.qk_rope_head_dim, heads * config.v_head_dim
    bias = latent + hidden + (query or 0) if config.attention_bias else 0
    queries = heads * config.qk_head_dim
    queries = hidden * queries if query is None else hidden * query + query + query * queries
    keys_and_values = config.kv_lora_rank * (1 + heads * config.qk_nope_head_dim + values)
    return queries + hidden * latent + keys_and_values + values * hidden + bias


def equal_head_size(config: LMConfig) -> int:
    """Return the size of MHA's or GQA's heads whose parameters are nearest to those of the MLA that config describes.

    Layers, width and heads are those of MLA; a head of queries, keys and values has d numbers, of which RoPE turns all:
    hidden * d * (2 heads + 2 key-value heads) parameters. d is even, so a model is up to a few thousandths off.
    """
    per_number = 2 * config.hidden_size * (config.num_attention_heads + config.num_key_value_heads)
    return max(2 * round(attention_parameters(config) / per_number / 2), 2)


def dense_twin(config: LMConfig) -> LMConfig:
    """Return the same without experts: each layer's FFN has as many parameters as a token uses of these on average.

    So its training FLOPs of a token are the same, to within the multiple of 8 that intermediate_size is rounded to. MTP
    layers are left as they are; without any (num_nextn_predict_layers 0) nothing of the twin has experts.
    """
    chosen = (config.num_experts_per_tok + config.n_shared_experts) * config.moe_intermediate_size
    routed = chosen + config.n_routed_experts / 3  # the router, as columns of three matrices
    dense, layers = config.first_k_dense_replace, config.num_hidden_layers
    mean = (dense * config.intermediate_size + (layers - dense) * routed) / layers
    return replace(config, first_k_dense_replace=layers, intermediate_size=max(8 * round(mean / 8), 8))


def activation_numbers(config: LMConfig) -> int:
    """Count the numbers that one token of training passes from product to product in the layers, MTP's included."""
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.qk_head_dim
    kv = heads * (config.qk_nope_head_dim + config.v_head_dim) if config.kv_lora_rank else 0
    rank, latent = config.q_lora_rank or 0, config.cache_width
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
