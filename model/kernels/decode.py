"""decode.c: its compiled library, its structs field by field, and the addresses of weights and of room for a step."""

from __future__ import annotations

import ctypes
import subprocess
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from LMConfig import LMConfig
from model.kernels.compiled import compiled, floats, integers

SOURCE = Path(__file__).with_name("decode.c")
WEIGHT_TYPES = (torch.float32, torch.bfloat16)
MOST_ROWS = 128  # of the head's product; with more, large matrix products are faster
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
    def of(cls, weight: Tensor, scales: Tensor | None = None) -> Matrix:
        """Where a weight is, (..., out, in), or its 8-bit codes and their scales; the caller keeps them alive."""
        return cls(weight.data_ptr(), None if scales is None else scales.data_ptr())


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


def projects(x: Tensor, weight: Tensor) -> bool:
    """Whether `project` applies: without gradients, for a few positions, for a weight that is not wrapped."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or x.numel() > MOST_ROWS * x.shape[-1]:
        return False
    if type(weight) is not nn.Parameter or not weight.is_contiguous() or weight.dtype not in WEIGHT_TYPES:
        return False
    return library(weight.dtype) is not None and not torch.compiler.is_compiling()


def project(x: Tensor, weight: Tensor, dtype: torch.dtype, scales: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, (..., out) float32: the output head for a few positions.

    Args:
        weight: in `dtype`, or 8-bit codes with their scales (out, 1).
        dtype: of the vectors that meet codes: bfloat16 lets them be rounded to 16 bits, float32 does not.
    """
    vectors, threads = x.float().contiguous(), torch.get_num_threads()
    out = vectors.new_empty(*x.shape[:-1], weight.shape[0])
    count, matrix = vectors[..., 0].numel(), Matrix.of(weight, scales)
    room = torch.empty(threads * fixed_point_size(count, weight.shape[1]), dtype=torch.int16, device="cpu")
    places = out.data_ptr(), vectors.data_ptr(), matrix.rows, matrix.scales, room.data_ptr()
    library(dtype).project(*places, count, *weight.shape, threads)
    return out


@lru_cache(maxsize=8)
def library(
    dtype: torch.dtype, fine: torch.dtype | None = None, held: torch.dtype = torch.float32
) -> ctypes.CDLL | None:
    """decode.c compiled for matrices of this type, norms and routers of type `fine`, and a cache of type `held`.

    None where that cannot be.
    """
    try:
        built = ctypes.CDLL(str(build(dtype, fine or dtype, held)))
    except (OSError, subprocess.CalledProcessError):
        return None
    built.step.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] + [ctypes.c_void_p] * 10 + [ctypes.c_int64] * 4
    built.step.argtypes += [ctypes.c_int]
    built.step.restype = None
    built.speculate.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    built.speculate.restype = ctypes.c_int64
    built.project.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 3 + [ctypes.c_int]
    built.project.restype = None
    return built


def build(dtype: torch.dtype, fine: torch.dtype, held: torch.dtype) -> Path:
    """Compile decode.c, or find it compiled. Raises OSError or CalledProcessError."""
    flags = ["-DBF16"] if dtype == torch.bfloat16 else []
    flags += ["-DFLOAT_NORMS"] if fine != dtype else []
    flags += ["-DHALF_CACHE"] if held == torch.bfloat16 else []
    return compiled(SOURCE, *flags)
