"""Decoding on CPU in C: `decode.c`, compiled once on the machine at hand. Without a C compiler PyTorch does the same.

python -m model.decoding.native        says whether it is there, and why not
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
from model.experts import Experts
from model.kernels.compiled import compiled
from model.kernels.structs import Layer, Matrix, fixed_point_size, layer_of, scratch_for, shape_of
from model.layer import DecoderLayer
from model.mla import MultiHeadLatentAttention
from model.moe import DeepseekMoE, Router, SwiGLU
from model.mtp import MTPLayer, SharedHead
from model.norm import RMSNorm
from model.ops import Linear
from model.quantized import Int8Weight, QuantizedLinear

MOST_TOKENS = 128  # in one step; with more, large matrix products are faster (docs/lab-log.md)
SOURCE = Path(__file__).parents[1] / "kernels" / "decode.c"
WEIGHT_TYPES = (torch.float32, torch.bfloat16)


class Decoder:
    """Neighbouring layers and a cache, ready to run: the addresses are taken once, weights are read where they are.

    Args:
        layers: plain ones, see `decoder`; their `self_attn.layer` is their place in the cache.
    """

    def __init__(self, layers: Sequence[DecoderLayer], config: LMConfig, cache: LatentCache) -> None:
        self.layers, self.config, self.cache = layers, config, cache
        self.places = range(layers[0].self_attn.layer, layers[0].self_attn.layer + len(layers))
        self.library = library(*types(layers), cache.latents.dtype)
        self.shape = shape_of(config, layers[0].self_attn.scale)
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
            self.scratch, self._room = scratch_for(self.config, tokens, self.cache.max_length, self.threads)
        if self.cache.latents is not self.latents:
            self.latents = self.cache.latents
            self.addresses = (Layer * len(self.layers))(*(layer_of(layer, self.latents) for layer in self.layers))


def decoder(layers: Sequence[DecoderLayer], config: LMConfig, x: Tensor, cache: LatentCache) -> Decoder | None:
    """What can run x (batch, time, hidden) through the layers in C, or None: on other devices, with gradients, for many
    tokens, and for weights that are wrapped, in 4 bits or watched by hooks.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or x.shape[0] * x.shape[1] > MOST_TOKENS:
        return None
    if cache.latents.dtype not in WEIGHT_TYPES or torch.compiler.is_compiling() or not len(layers):
        return None
    if x.shape[0] > cache.latents.shape[1]:  # PyTorch says what is wrong
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
    room = torch.empty(threads * fixed_point_size(count, weight.shape[1]), dtype=torch.int16, device="cpu")
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
    ours |= {Experts, Router, RMSNorm, Linear, QuantizedLinear, Int8Weight}
    for module in (module for layer in layers for module in layer.modules()):
        if type(module) not in ours or module._forward_hooks or module._forward_pre_hooks:
            return False
        if isinstance(module, Router) and module.e_score_correction_bias.dtype != torch.float32:
            return False
    weights = [weight for layer in layers for weight in layer.parameters()]
    found = types(layers)
    plain = found is not None and all(w.is_contiguous() and type(w) is nn.Parameter for w in weights)
    return plain and all(map(_quantized_wholly, layers)) and library(*found, held) is not None


def _quantized_wholly(layer: DecoderLayer) -> bool:
    """All matrices of a layer are in 8 bits, or none is."""
    quantized = {type(module) is QuantizedLinear for module in layer.modules() if isinstance(module, nn.Linear)}
    for module in layer.modules():
        if isinstance(module, Experts):
            quantized |= {type(weight) is Int8Weight for weight in (module.gate_up_proj, module.down_proj)}
    return len(quantized) == 1


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
