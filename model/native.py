"""Decoding on CPU in C: `decode.c`, compiled once on the machine at hand. Without a C compiler PyTorch does the same.

python -m model.native        says whether it is there, and why not
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from LMConfig import LMConfig
from model.cache import LatentCache
from model.compiled import compiled
from model.experts import Experts
from model.layer import DecoderLayer
from model.mla import MultiHeadLatentAttention
from model.moe import DeepseekMoE, Router, SwiGLU
from model.mtp import MTPLayer, SharedHead
from model.norm import RMSNorm
from model.products import Linear

MOST_TOKENS = 128  # in one step; with more, large matrix products are faster (docs/lab-log.md)
SOURCE = Path(__file__).with_name("decode.c")
WEIGHT_TYPES = (torch.float32, torch.bfloat16)

# The structs of decode.c, field by field.
WHOLE = (
    "hidden heads nope rope value rank q_rank dense_inner shared_inner experts expert_inner top_k groups top_groups "
    "normalise"
)
REAL = "eps scale routed_scale"
WEIGHTS = (
    "input_norm q_a_norm kv_a_norm post_norm router q_a q_a_bias q_b kv_a kv_a_bias kv_b o o_bias gate up down "
    "gate_up_experts down_experts router_bias cache"
)
ROOM = (
    "normed q_a q kv attended inner affinity choice_weight choice_inner joined angles scores choice token_of first_of"
)


class Shape(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in WHOLE.split()] + [(n, ctypes.c_float) for n in REAL.split()]


class Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in WEIGHTS.split()]


class Scratch(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ROOM.split()]


class Decoder:
    """Neighbouring layers and a cache, ready to run: the addresses are taken once, weights are read where they are.

    Args:
        layers: plain ones, see `decoder`; their `self_attn.layer` is their place in the cache.
    """

    def __init__(self, layers: Sequence[DecoderLayer], config: LMConfig, cache: LatentCache) -> None:
        self.layers, self.config, self.cache = layers, config, cache
        self.places = range(layers[0].self_attn.layer, layers[0].self_attn.layer + len(layers))
        self.library = library(*types(layers))
        self.shape = _shape(config, layers[0].self_attn.scale)
        self.threads = torch.get_num_threads()
        self.tokens = 0
        self.latents = None

    def run(self, x: Tensor, rope: Tensor) -> Tensor:
        """New positions through the layers, and into the cache: the same numbers as `DecoderLayer.forward`.

        Args:
            x: (batch, time, hidden); rope: (batch or 1, time, 1, rope/2) complex.
        Returns:
            (batch, time, hidden) of the type of x; between the layers all numbers are float32.
        """
        batch, time, _ = x.shape
        self.prepare(batch * time)
        held = self.cache.reserve_rows(self.places, batch, time)
        out = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        angles = torch.view_as_real(rope).expand(batch, -1, -1, -1, -1).contiguous()
        padding = self.cache.padding
        self.library.decode(
            ctypes.byref(self.shape),
            self.addresses,
            len(self.layers),
            ctypes.byref(self.scratch),
            out.data_ptr(),
            angles.data_ptr(),
            None if padding is None else padding.data_ptr(),
            held.data_ptr(),
            batch,
            time,
            self.cache.max_length,
            self.threads,
        )
        return out.to(x.dtype)

    def prepare(self, tokens: int) -> None:
        """Room for so many tokens, and new addresses where the cache has let rows go."""
        if tokens > self.tokens:
            self.tokens = tokens
            self.scratch, self._room = _scratch(self.config, tokens, self.cache.max_length, self.threads)
        if self.cache.latents is not self.latents:
            self.latents = self.cache.latents
            self.addresses = (Layer * len(self.layers))(*(_layer(layer, self.latents) for layer in self.layers))


def decoder(layers: Sequence[DecoderLayer], config: LMConfig, x: Tensor, cache: LatentCache) -> Decoder | None:
    """What can run x (batch, time, hidden) through the layers in C, or None: on other devices, with gradients, for many
    tokens, and for weights that are wrapped, quantised or watched by hooks.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or x.shape[0] * x.shape[1] > MOST_TOKENS:
        return None
    if cache.latents.dtype != torch.float32 or torch.compiler.is_compiling() or not len(layers):
        return None
    place = layers[0].self_attn.layer
    if place not in cache.decoders:
        cache.decoders[place] = Decoder(layers, config, cache) if _plain(layers) else None
    return cache.decoders[place]


def project(x: Tensor, weight: Tensor) -> Tensor | None:
    """x (..., in) times weight (out, in) transposed, (..., out) float32: the output head for a few positions.

    None where this is not the place for it; see `decoder`.
    """
    few = x.device.type == "cpu" and not torch.is_grad_enabled() and x.numel() <= MOST_TOKENS * x.shape[-1]
    if not few or type(weight) is not nn.Parameter or not weight.is_contiguous() or weight.dtype not in WEIGHT_TYPES:
        return None
    if library(weight.dtype) is None or torch.compiler.is_compiling():
        return None
    vectors = x.float().contiguous()
    out = vectors.new_empty(*x.shape[:-1], weight.shape[0])
    library(weight.dtype).project(
        out.data_ptr(),
        vectors.data_ptr(),
        weight.data_ptr(),
        vectors[..., 0].numel(),
        *weight.shape,
        torch.get_num_threads(),
    )
    return out


@lru_cache(maxsize=4)
def library(dtype: torch.dtype, fine: torch.dtype | None = None) -> ctypes.CDLL | None:
    """decode.c compiled for matrices of this type, norms and routers of type `fine`; None where that cannot be."""
    try:
        built = ctypes.CDLL(str(build(dtype, fine or dtype)))
    except (OSError, subprocess.CalledProcessError):
        return None
    built.decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64] + [ctypes.c_void_p] * 5
    built.decode.argtypes += [ctypes.c_int64] * 3 + [ctypes.c_int]
    built.decode.restype = None
    built.step.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] + [ctypes.c_void_p] * 10 + [ctypes.c_int64] * 4
    built.step.argtypes += [ctypes.c_int]
    built.step.restype = None
    built.speculate.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    built.speculate.restype = ctypes.c_int64
    built.project.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_int]
    built.project.restype = None
    return built


def build(dtype: torch.dtype, fine: torch.dtype) -> Path:
    """Compile decode.c, or find it compiled. Raises OSError or CalledProcessError."""
    flags = ["-DBF16"] if dtype == torch.bfloat16 else []
    flags += ["-DFLOAT_NORMS"] if fine != dtype else []
    return compiled(SOURCE, *flags)


def _plain(layers: Sequence[DecoderLayer]) -> bool:
    """Every module is ours and unhooked, the weights of types that decode.c reads; and decode.c was compiled."""
    ours = {DecoderLayer, MTPLayer, SharedHead, MultiHeadLatentAttention, DeepseekMoE, SwiGLU}
    ours |= {Experts, Router, RMSNorm, Linear}
    for module in (module for layer in layers for module in layer.modules()):
        if type(module) not in ours or module._forward_hooks or module._forward_pre_hooks:
            return False
    weights = [weight for layer in layers for weight in layer.parameters()]
    found = types(layers)
    plain = found is not None and all(w.is_contiguous() and type(w) is nn.Parameter for w in weights)
    return plain and library(*found) is not None


def types(layers: Sequence[DecoderLayer]) -> tuple[torch.dtype, torch.dtype] | None:
    """The type of the matrices, and that of norms and routers, the same or float32; None for any others."""
    matrices, fine = set(), set()
    for module in (module for layer in layers for module in layer.modules()):
        found = fine if isinstance(module, (RMSNorm, Router)) else matrices
        found.update(weight.dtype for weight in module.parameters(recurse=False))
    if (
        len(matrices) != 1
        or len(fine) != 1
        or not matrices <= set(WEIGHT_TYPES)
        or not fine <= matrices | {torch.float32}
    ):
        return None
    return matrices.pop(), fine.pop()


def _shape(config: LMConfig, scale: float) -> Shape:
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


def _layer(layer: DecoderLayer, latents: Tensor) -> Layer:
    """The addresses of all weights, and of the layer's part of the cache."""
    attention, mlp = layer.self_attn, layer.mlp
    compressed = hasattr(attention, "q_a_proj")
    dense = mlp.shared_experts if layer.is_moe else mlp
    tensors = {
        "input_norm": layer.input_layernorm.weight,
        "q_a": attention.q_a_proj.weight if compressed else None,
        "q_a_bias": attention.q_a_proj.bias if compressed else None,
        "q_a_norm": attention.q_a_layernorm.weight if compressed else None,
        "q_b": attention.q_b_proj.weight if compressed else attention.q_proj.weight,
        "kv_a": attention.kv_a_proj_with_mqa.weight,
        "kv_a_bias": attention.kv_a_proj_with_mqa.bias,
        "kv_a_norm": attention.kv_a_layernorm.weight,
        "kv_b": attention.kv_b_proj.weight,
        "o": attention.o_proj.weight,
        "o_bias": attention.o_proj.bias,
        "post_norm": layer.post_attention_layernorm.weight,
        "cache": latents[attention.layer],
    }
    if dense is not None:
        tensors |= {"gate": dense.gate_proj.weight, "up": dense.up_proj.weight, "down": dense.down_proj.weight}
    if layer.is_moe:
        tensors |= {"router": mlp.gate.weight, "router_bias": mlp.gate.e_score_correction_bias}
        tensors |= {"gate_up_experts": mlp.experts.gate_up_proj, "down_experts": mlp.experts.down_proj}
    return Layer(**{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()})


def _scratch(config: LMConfig, tokens: int, capacity: int, threads: int) -> tuple[Scratch, tuple[Tensor, ...]]:
    """Room for a step's numbers, and the tensors that own it."""
    choices = tokens * config.num_experts_per_tok
    shared = config.n_shared_experts * config.moe_intermediate_size
    floats = {
        "normed": tokens * config.hidden_size,
        "q_a": tokens * (config.q_lora_rank or 0),
        "q": tokens * config.num_attention_heads * config.qk_head_dim,
        "kv": tokens * (config.kv_lora_rank + config.qk_rope_head_dim),
        "attended": tokens * config.num_attention_heads * config.v_head_dim,
        "inner": tokens * max(config.intermediate_size, shared),
        "affinity": tokens * config.n_routed_experts,
        "choice_weight": choices,
        "choice_inner": choices * config.moe_intermediate_size,
        "joined": tokens * 2 * config.hidden_size,
        "angles": tokens * config.qk_rope_head_dim,
        "scores": capacity * threads,
    }
    integers = {"choice": choices, "token_of": choices, "first_of": config.n_routed_experts + 1}
    room, whole = torch.empty(sum(floats.values())), torch.empty(sum(integers.values()), dtype=torch.int64)
    parts = [*room.split(list(floats.values())), *whole.split(list(integers.values()))]
    addresses = {name: part.data_ptr() for name, part in zip([*floats, *integers], parts, strict=True)}
    return Scratch(**addresses), (room, whole)


def main() -> None:
    """Tell whether decoding runs in C here."""
    for dtype in WEIGHT_TYPES:
        try:
            print(f"{dtype}: {build(dtype, dtype)}")
        except subprocess.CalledProcessError as error:
            print(f"{dtype}: PyTorch decodes; {' '.join(error.cmd)} failed:\n{error.stderr}", file=sys.stderr)
        except OSError as error:
            print(f"{dtype}: PyTorch decodes; {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
