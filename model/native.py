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
from model.packed import Int8Weight, PackedLinear
from model.products import Linear

HEADS = 4  # as in latents.h
MOST_TOKENS = 128  # in one step; with more, large matrix products are faster (docs/lab-log.md)
SOURCE = Path(__file__).with_name("decode.c")
WEIGHT_TYPES = (torch.float32, torch.bfloat16)

# The structs of decode.c, field by field.
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


class Decoder:
    """Neighbouring layers and a cache, ready to run: the addresses are taken once, weights are read where they are.

    Args:
        layers: plain ones, see `decoder`; their `self_attn.layer` is their place in the cache.
    """

    def __init__(self, layers: Sequence[DecoderLayer], config: LMConfig, cache: LatentCache) -> None:
        self.layers, self.config, self.cache = layers, config, cache
        self.places = range(layers[0].self_attn.layer, layers[0].self_attn.layer + len(layers))
        self.library = library(*types(layers), cache.latents.dtype)
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
    tokens, and for weights that are wrapped, in 4 bits or watched by hooks.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or x.shape[0] * x.shape[1] > MOST_TOKENS:
        return None
    if cache.latents.dtype not in WEIGHT_TYPES or torch.compiler.is_compiling() or not len(layers):
        return None
    place = layers[0].self_attn.layer
    if place not in cache.decoders:
        cache.decoders[place] = Decoder(layers, config, cache) if _plain(layers, cache.latents.dtype) else None
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
    return _project(x, weight, weight.dtype)


def project_codes(x: Tensor, weight: Int8Weight, dtype: torch.dtype) -> Tensor | None:
    """The same with a weight in 8 bits; None without a C compiler.

    dtype: of the vectors that meet the codes: bfloat16 lets them be rounded to 16 bits, float32 does not.
    """
    return None if library(dtype) is None else _project(x, weight, dtype)


def _project(x: Tensor, weight: Tensor | Int8Weight, dtype: torch.dtype) -> Tensor:
    vectors, threads = x.float().contiguous(), torch.get_num_threads()
    out = vectors.new_empty(*x.shape[:-1], weight.shape[0])
    count, matrix = vectors[..., 0].numel(), Matrix.of(weight)
    room = torch.empty(threads * _fixed_size(count, weight.shape[1]), dtype=torch.int16)
    library(dtype).project(
        out.data_ptr(),
        vectors.data_ptr(),
        matrix.rows,
        matrix.scales,
        room.data_ptr(),
        count,
        *weight.shape,
        threads,
    )
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
    built.decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64] + [ctypes.c_void_p] * 5
    built.decode.argtypes += [ctypes.c_int64] * 3 + [ctypes.c_int]
    built.decode.restype = None
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


def _plain(layers: Sequence[DecoderLayer], held: torch.dtype) -> bool:
    """Every module is ours and unhooked, the weights of types that decode.c reads; and decode.c was compiled."""
    ours = {DecoderLayer, MTPLayer, SharedHead, MultiHeadLatentAttention, DeepseekMoE, SwiGLU}
    ours |= {Experts, Router, RMSNorm, Linear, PackedLinear, Int8Weight}
    for module in (module for layer in layers for module in layer.modules()):
        if type(module) not in ours or module._forward_hooks or module._forward_pre_hooks:
            return False
    weights = [weight for layer in layers for weight in layer.parameters()]
    found = types(layers)
    plain = found is not None and all(w.is_contiguous() and type(w) is nn.Parameter for w in weights)
    return plain and all(map(_packed_wholly, layers)) and library(*found, held) is not None


def _packed_wholly(layer: DecoderLayer) -> bool:
    """All matrices of a layer are in 8 bits, or none is."""
    packed = {type(module) is PackedLinear for module in layer.modules() if isinstance(module, nn.Linear)}
    for module in layer.modules():
        if isinstance(module, Experts):
            packed |= {type(weight) is Int8Weight for weight in (module.gate_up_proj, module.down_proj)}
    return len(packed) == 1


def types(layers: Sequence[DecoderLayer]) -> tuple[torch.dtype, torch.dtype] | None:
    """The type of the matrices, and that of norms and routers, the same or float32; None for any others.

    Where all matrices are in 8 bits, the vectors that they meet are of the type of the norms.
    """
    matrices, fine = set(), set()
    for module in (module for layer in layers for module in layer.modules()):
        found = fine if isinstance(module, (RMSNorm, Router)) else matrices
        found.update(weight.dtype for weight in module.parameters(recurse=False))
    matrices = matrices or set(fine)
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
    return module.packed if isinstance(module, PackedLinear) else module.weight


def _scratch(config: LMConfig, tokens: int, capacity: int, threads: int) -> tuple[Scratch, tuple[Tensor, ...]]:
    """Room for a step's numbers, and the tensors that own it."""
    choices = tokens * config.num_experts_per_tok
    shared = config.n_shared_experts * config.moe_intermediate_size
    inner, attended = max(config.intermediate_size, shared), config.num_attention_heads * config.v_head_dim
    floats = {
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
    integers = {"choice": choices, "token_of": choices, "first_of": config.n_routed_experts + 1}
    widest = max(2 * config.hidden_size, config.q_lora_rank or 0, config.kv_lora_rank, attended, inner)
    fixed_size = max(_fixed_size(tokens, widest), _fixed_size(choices, config.moe_intermediate_size))
    room, whole = torch.empty(sum(floats.values())), torch.empty(sum(integers.values()), dtype=torch.int64)
    fixed = torch.empty(fixed_size * threads, dtype=torch.int16)
    parts = [*room.split(list(floats.values())), *whole.split(list(integers.values())), fixed]
    names = [*floats, *integers, "fixed"]
    addresses = {name: part.data_ptr() for name, part in zip(names, parts, strict=True)}
    return Scratch(**addresses, fixed_size=fixed_size), (room, whole, fixed)


def _fixed_size(count: int, width: int) -> int:
    """Numbers of 16 bits that so many vectors take in fixed point, at most; see `vectors` in rows.h."""
    return 2 * count * (width + 31)


def main() -> None:
    """Tell whether decoding runs in C here."""
    for dtype in WEIGHT_TYPES:
        try:
            print(f"{dtype}: {build(dtype, dtype, dtype)}")
        except subprocess.CalledProcessError as error:
            print(f"{dtype}: PyTorch decodes; {' '.join(error.cmd)} failed:\n{error.stderr}", file=sys.stderr)
        except OSError as error:
            print(f"{dtype}: PyTorch decodes; {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
