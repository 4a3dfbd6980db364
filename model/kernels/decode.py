"""decode.c: its compiled library, its structs field by field, and the addresses of weights."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor, nn

from LMConfig import LMConfig
from model.kernels import compiled
from model.kernels.compiled import INTEGER, POINTER, REAL, fields, readable

MOST_ROWS = 128  # of the head's product; with more, large matrix products are faster


class Shape(ctypes.Structure):
    _fields_ = fields(
        (INTEGER, "hidden heads nope rope value rank q_rank dense_inner shared_inner"),
        (INTEGER, "experts expert_inner top_k groups top_groups normalise"),
        (REAL, "eps scale routed_scale"),
    )

    @classmethod
    def of(cls, c: LMConfig, scale: float) -> Shape:
        """What decode.c knows of a configuration; scale: of the attention scores."""
        return cls(
            *(c.hidden_size, c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim),
            *(c.kv_lora_rank, c.q_lora_rank or 0, c.intermediate_size, c.n_shared_experts * c.moe_intermediate_size),
            *(c.n_routed_experts, c.moe_intermediate_size, c.num_experts_per_tok, c.n_group, c.topk_group),
            *(c.norm_topk_prob, c.rms_norm_eps, scale, c.routed_scaling_factor),
        )


class Matrix(ctypes.Structure):
    _fields_ = fields((POINTER, "rows scales"))

    @classmethod
    def of(cls, weight: Tensor, scales: Tensor | None = None) -> Matrix:
        """Where a weight is, (..., out, in), or its 8-bit codes and their scales; the caller keeps them alive."""
        return cls(weight.data_ptr(), None if scales is None else scales.data_ptr())


class Layer(ctypes.Structure):
    _fields_ = fields(
        (POINTER, "input_norm q_a_norm kv_a_norm post_norm router"),
        (Matrix, "q_a q_b kv_a kv_b o"),
        (POINTER, "q_a_bias kv_a_bias o_bias"),
        (Matrix, "gate up down gate_up_experts down_experts"),
        (POINTER, "router_bias cache"),
    )


class Ends(ctypes.Structure):
    _fields_ = fields(
        (INTEGER, "vocab"), (POINTER, "embedding"), (Matrix, "head eh_proj"), (POINTER, "enorm hnorm norm angles")
    )


def projects(x: Tensor, weight: Tensor) -> bool:
    """Whether `project` applies: without gradients, for a few positions, for a weight that is not wrapped."""
    if torch.is_grad_enabled() or not readable(x, weight) or x.numel() > MOST_ROWS * x.shape[-1]:
        return False
    return type(weight) is nn.Parameter and weight.is_contiguous() and library(weight.dtype) is not None


def project(x: Tensor, weight: Tensor, dtype: torch.dtype, scales: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, (..., out) float32: the output head for a few positions.

    Args:
        weight: in `dtype`, or 8-bit codes with their scales (out, 1).
        dtype: of the vectors that meet codes: bfloat16 lets them be rounded to 16 bits, float32 does not.
    """
    vectors, threads = x.float().contiguous(), torch.get_num_threads()
    out, count = vectors.new_empty(*x.shape[:-1], weight.shape[0]), vectors[..., 0].numel()
    room = compiled.scratch(threads * count * (weight.shape[1] + 31))  # of twice as many numbers of 16 bits
    library(dtype).project(out, vectors, weight, scales, room, count, *weight.shape, threads)
    return out


@lru_cache(maxsize=8)
def library(
    dtype: torch.dtype, fine: torch.dtype | None = None, held: torch.dtype = torch.float32
) -> ctypes.CDLL | None:
    """Open decode.c for matrices of this type, norms and routers of type `fine`, and a cache of type `held`.

    None where that cannot be.
    """
    flags = ["-DFLOAT_NORMS"] if fine not in (None, dtype) else []
    flags += ["-DHALF_CACHE"] if held == torch.bfloat16 else []
    return compiled.library(
        *("decode.c", dtype, *flags),
        step="ppltpttttttttlllli", speculate="ptplpppptttttllfillp>", project="tttttllli", scratch="plli>",
    )  # fmt: skip
