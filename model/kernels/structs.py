"""What `decode.c` is given: its structs field by field, and the addresses of weights and of room for a step."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from LMConfig import LMConfig
from model.kernels.compiled import floats, integers
from model.layer import DecoderLayer
from model.quantized import Int8Weight, QuantizedLinear

HEADS = 4  # as in latents.h

# Fields of the structs, in their order.
WHOLE = (
    "hidden heads nope rope value rank q_rank dense_inner shared_inner experts expert_inner top_k groups top_groups "
    "normalise"
)
REAL = "eps scale routed_scale"
VECTORS = "input_norm q_a_norm kv_a_norm post_norm router"
MATRICES = "q_a q_b kv_a kv_b o"
BIASES = "q_a_bias kv_a_bias o_bias"
FEED_FORWARD = "gate up down gate_up_experts down_experts"
ROOM = (
    "normed q_a q kv attended inner affinity choice_weight choice_inner joined angles mixed scores queries "
    "fixed choice token_of first_of"
)
GIVEN = "shape scratch layers mtp"
PASS = "count most capacity"
RESULTS = "ends mtp_ends line states x logits confidence choice"


class Shape(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in WHOLE.split()] + [(n, ctypes.c_float) for n in REAL.split()]


class Matrix(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_void_p), ("scales", ctypes.c_void_p)]

    @classmethod
    def of(cls, weight: Tensor | Int8Weight) -> Matrix:
        """Where a weight is, (..., out, in); the caller keeps it alive."""
        if isinstance(weight, Int8Weight):
            return cls(weight.codes.data_ptr(), weight.scales.data_ptr())
        return cls(weight.data_ptr(), None)


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in VECTORS.split()),
        *((name, Matrix) for name in MATRICES.split()),
        *((name, ctypes.c_void_p) for name in BIASES.split()),
        *((name, Matrix) for name in FEED_FORWARD.split()),
        *((name, ctypes.c_void_p) for name in ("router_bias", "cache")),
    ]


class Scratch(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ROOM.split()), ("fixed_size", ctypes.c_int64)]


class Ends(ctypes.Structure):
    _fields_ = [
        ("vocab", ctypes.c_int64),
        ("embedding", ctypes.c_void_p),
        *((name, Matrix) for name in ("head", "eh_proj")),
        *((name, ctypes.c_void_p) for name in ("enorm", "hnorm", "norm", "angles")),
    ]


class Speculation(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in GIVEN.split()),
        *((name, ctypes.c_int64) for name in PASS.split()),
        *((name, ctypes.c_void_p) for name in RESULTS.split()),
        ("likely", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


def shape_of(config: LMConfig, scale: float) -> Shape:
    """What decode.c knows of a configuration; scale: of the attention scores."""
    return Shape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        value=config.v_head_dim,
        rank=config.kv_lora_rank,
        q_rank=config.q_lora_rank or 0,
        dense_inner=config.intermediate_size,
        shared_inner=config.n_shared_experts * config.moe_intermediate_size,
        experts=config.n_routed_experts,
        expert_inner=config.moe_intermediate_size,
        top_k=config.num_experts_per_tok,
        groups=config.n_group,
        top_groups=config.topk_group,
        normalise=config.norm_topk_prob,
        eps=config.rms_norm_eps,
        scale=scale,
        routed_scale=config.routed_scaling_factor,
    )


def layer_of(layer: DecoderLayer, latents: Tensor) -> Layer:
    """The addresses of all weights, and of the layer's part of the cache."""
    attention, mlp = layer.self_attn, layer.mlp
    compressed = hasattr(attention, "q_a_proj")
    dense = mlp.shared_experts if layer.is_moe else mlp
    linear = {
        "q_a": attention.q_a_proj if compressed else None,
        "q_b": attention.q_b_proj if compressed else attention.q_proj,
        "kv_a": attention.kv_a_proj_with_mqa,
        "kv_b": attention.kv_b_proj,
        "o": attention.o_proj,
    }
    tensors = {
        "input_norm": layer.input_layernorm.weight,
        "q_a_norm": attention.q_a_layernorm.weight if compressed else None,
        "kv_a_norm": attention.kv_a_layernorm.weight,
        "post_norm": layer.post_attention_layernorm.weight,
        "cache": latents[attention.layer],
    }
    tensors |= {f"{name}_bias": linear[name].bias for name in ("q_a", "kv_a", "o") if linear[name] is not None}
    if dense is not None:
        linear |= {"gate": dense.gate_proj, "up": dense.up_proj, "down": dense.down_proj}
    matrices = {name: weight_of(module) for name, module in linear.items() if module is not None}
    if layer.is_moe:
        tensors |= {"router": mlp.gate.weight, "router_bias": mlp.gate.e_score_correction_bias}
        matrices |= {"gate_up_experts": mlp.experts.gate_up_proj, "down_experts": mlp.experts.down_proj}
    addresses = {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    return Layer(**addresses, **{name: Matrix.of(weight) for name, weight in matrices.items()})


def weight_of(module: nn.Linear) -> Tensor | Int8Weight:
    """What `Matrix.of` takes of a linear layer."""
    return module.quantized if isinstance(module, QuantizedLinear) else module.weight


def scratch_for(config: LMConfig, tokens: int, capacity: int, threads: int) -> tuple[Scratch, tuple[Tensor, ...]]:
    """Room for a step's numbers, and the tensors that own it."""
    choices = tokens * config.num_experts_per_tok
    shared = config.n_shared_experts * config.moe_intermediate_size
    inner, attended = max(config.intermediate_size, shared), config.num_attention_heads * config.v_head_dim
    reals = {
        "normed": tokens * config.hidden_size,
        "q_a": tokens * (config.q_lora_rank or 0),
        "q": tokens * config.num_attention_heads * config.qk_head_dim,
        "kv": tokens * (config.kv_lora_rank + config.qk_rope_head_dim),
        "attended": tokens * attended,
        "inner": tokens * inner,
        "affinity": tokens * config.n_routed_experts,
        "choice_weight": choices,
        "choice_inner": choices * config.moe_intermediate_size,
        "joined": tokens * 2 * config.hidden_size,
        "angles": tokens * config.qk_rope_head_dim,
        "mixed": tokens * config.num_attention_heads * config.kv_lora_rank,
        "scores": HEADS * (capacity + 3) * threads,
        "queries": tokens * (config.num_attention_heads + HEADS - 1) * (config.kv_lora_rank + config.qk_rope_head_dim),
    }
    counts = {"choice": choices, "token_of": choices, "first_of": config.n_routed_experts + 1}
    widest = max(2 * config.hidden_size, config.q_lora_rank or 0, config.kv_lora_rank, attended, inner)
    fixed_size = max(fixed_point_size(tokens, widest), fixed_point_size(choices, config.moe_intermediate_size))
    room, whole = floats(sum(reals.values())), integers(sum(counts.values()))
    fixed = torch.empty(fixed_size * threads, dtype=torch.int16, device="cpu")
    parts = [*room.split(list(reals.values())), *whole.split(list(counts.values())), fixed]
    names = [*reals, *counts, "fixed"]
    addresses = {name: part.data_ptr() for name, part in zip(names, parts, strict=True)}
    return Scratch(**addresses, fixed_size=fixed_size), (room, whole, fixed)


def fixed_point_size(count: int, width: int) -> int:
    """Numbers of 16 bits that so many vectors take in fixed point, at most; see `vectors` in rows.h."""
    return 2 * count * (width + 31)
