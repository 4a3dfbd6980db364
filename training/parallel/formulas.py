"""What a plan counts with: GPUs, schedules of a pipeline, rows sent to experts, activations of a layer."""

from __future__ import annotations

from math import comb
from typing import NamedTuple

from LMConfig import LMConfig
from model.costs import human

BF16, FP32 = 2, 4  # bytes


class Line(NamedTuple):
    """One number of a plan, with its unit, and where it comes from."""

    name: str
    value: float
    unit: str
    formula: str

    def __str__(self) -> str:
        number = f"{self.value:.3g} s" if self.unit == "s" else human(self.value, self.unit)
        return f"  {self.name:<30}{number:>12}   {self.formula}"


class Gpu(NamedTuple):
    """Attributes: memory: bytes; flops: FLOP/s of bf16 products; nvlink, ib: bytes a second that one GPU sends."""

    memory: float
    flops: float
    nvlink: float
    ib: float


# NVLink at 80 % of its rate, as the report measures it (section 3.2.2: 160 GB/s of an H800, 50 GB/s over IB).
GPUS = {
    "a100": Gpu(80e9, 312e12, 240e9, 25e9),
    "h100": Gpu(80e9, 989e12, 360e9, 50e9),
    "h200": Gpu(141e9, 989e12, 360e9, 50e9),
    "h800": Gpu(80e9, 989e12, 160e9, 50e9),
}
# Of P ranks, with F and B the seconds of a micro-batch on a rank and W those of B's weight gradients: what a rank idles
# a step (Table 2 of the report; in the V, chunks are half a rank's work), and micro-batches whose activations it holds.
BUBBLES = {
    "1f1b": ("(P-1) (F+B)", lambda P, F, B, W: (P - 1) * (F + B), lambda P: P),
    "zbv": ("(P-1) (F+B-2W), ZB1P's", lambda P, F, B, W: (P - 1) * (F + B - 2 * W), lambda P: P),
    "dualpipe": ("(P/2-1) (F&B+B-3W)", lambda P, F, B, W: (P / 2 - 1) * (F + B + B - 3 * W), lambda P: P + 1),
    "dualpipev": ("(P-1) (F&B+B-3W) / 2", lambda P, F, B, W: (P - 1) * (F + B + B - 3 * W) / 2, lambda P: P + 0.5),
}


class Sent(NamedTuple):
    """Copies of a token that a MoE layer sends away, on average: to ranks over IB and NVLink; to other nodes."""

    ib: float
    nvlink: float
    nodes: float


def rows_sent(config: LMConfig, ep: int, node: int) -> Sent:
    """Count them for experts chosen at random within the groups that the router allows, once a rank.

    A rank misses a token with probability C(n - e, K) / C(n, K): n experts to choose from, e of them its own.
    """
    groups, limit, chosen, experts = config.n_group, config.topk_group, config.num_experts_per_tok, 0
    experts = config.n_routed_experts
    allowed = experts * limit // groups  # experts of the groups that a token may go to

    def hit(own: int) -> float:
        """Probability that at least one of `own` neighbouring experts is among the chosen."""
        per_group = experts // groups
        if own <= per_group:  # within one group, which is allowed with probability limit / groups
            return limit / groups * (1 - comb(allowed - own, chosen) / comb(allowed, chosen))
        spans, missed = own // per_group, 0.0  # several groups, of which some are allowed
        for inside in range(max(0, limit - groups + spans), min(spans, limit) + 1):
            share = comb(spans, inside) * comb(groups - spans, limit - inside) / comb(groups, limit)
            missed += share * comb(allowed - inside * per_group, chosen) / comb(allowed, chosen)
        return 1 - missed

    a_rank = hit(experts // ep)
    beside = min(ep, node)
    nodes = ep // beside
    return Sent((ep - beside) * a_rank, (beside - 1) * a_rank, (nodes - 1) * hit(experts // nodes))


def exchanged(zero: int, held: float, micro_batches: int) -> dict[str, float]:
    """Return the bytes that a rank sends of gradients and weights in a step, by kind.

    held: the sum of what each ring of n ranks shares, times (n-1)/n. Gradients go there in fp32, and (0) come back,
    or (1) weights in bf16; (3) with each micro-batch, the weights for its backward pass once more.
    """
    if zero == 0:
        return {"all-reduce": 2 * FP32 * held}
    rounds, gathered = (micro_batches, 2) if zero == 3 else (1, 1)
    return {"reduce-scatter": FP32 * held * rounds, "all-gather": gathered * BF16 * held * rounds}


def kept_bytes(config: LMConfig, moe: bool) -> int:
    """Count what the backward pass of a layer needs of one token, nothing computed again, products in bf16."""
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.qk_head_dim
    rank = 2 * (config.q_lora_rank or 0)  # before and after its norm
    latent = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    attention = 4 * heads * width + heads * config.v_head_dim  # q, k, v and output in one size; output again, cut
    numbers = 4 * hidden + rank + latent + attention  # the stream before and after each of the two norms
    if moe:
        inner = config.moe_intermediate_size
        chosen, shared = config.num_experts_per_tok, config.n_shared_experts
        numbers += 2 * hidden + chosen * (hidden + 3 * inner) + shared * 3 * inner  # 2: the router's input in fp32
    else:
        numbers += 3 * config.intermediate_size
    return BF16 * numbers


def kept_by_report(config: LMConfig, moe: bool) -> int:
    """Count what of it the report keeps: the stream and the latents in bf16, what enters attention's last product in 12
    bits, what enters the experts and their SwiGLU in 8 (sections 3.2.3 and 3.3.3)."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    latents = (config.q_lora_rank or 0) + config.kv_lora_rank + config.qk_rope_head_dim
    kept = BF16 * (2 * hidden + latents) + config.num_attention_heads * config.v_head_dim * 3 // 2
    if not moe:
        return kept + 2 * config.intermediate_size
    return kept + config.num_experts_per_tok * (hidden + 2 * inner) + config.n_shared_experts * 2 * inner
