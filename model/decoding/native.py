"""Decoding on CPU in C: one call of decode.c a step. Without a C compiler PyTorch does the same.

python -m model.decoding.native        says whether it is there, and why not
"""

from __future__ import annotations

import copy
import ctypes
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.attention import select_positions
from model.cache import LatentCache
from model.decoding.eager import EagerRunner, Step
from model.experts import Experts
from model.kernels.compiled import TYPES, compiled, floats, integers, scratch
from model.kernels.decode import Ends, Layer, Matrix, Shape, library
from model.layer import DecoderLayer
from model.mla import MultiHeadLatentAttention
from model.moe import DeepseekMoE, Router, SwiGLU
from model.mtp import MTPLayer, SharedHead
from model.norm import RMSNorm
from model.ops import Linear, head_logits
from model.quantized import Int8Weight, QuantizedLinear, quantize_weights

if TYPE_CHECKING:
    from model.transformer import MiniDeepSeek

Layers = Sequence[DecoderLayer]
MOST_TOKENS = 128  # in one step; with more, large matrix products are faster (docs/lab-log.md)


class NativeRunner(EagerRunner):
    """Steps in C; in PyTorch with gradients, autocast, many tokens, or weights wrapped, in 4 bits or hooked."""

    any_rows = MOST_TOKENS

    def __init__(self, model: MiniDeepSeek, cache: LatentCache) -> None:
        super().__init__(model, cache)
        self._programs: dict[int, Program | None] = {}

    def prefill(self, ids: Tensor, last_positions: Tensor | None = None) -> Tensor:
        if (program := self.program(0, ids)) is None:
            return super().prefill(ids, last_positions)
        check_vocabulary(ids, len(self.head))
        states = program.run(ids, 1).states
        last = states[:, -1:] if last_positions is None else select_positions(states, last_positions)
        return head_logits(self.model.model.norm(last.to(self.head.dtype)).squeeze(1), self.head)

    def step(self, ids: Tensor, last: int = 1) -> Step:
        program = self.program(0, ids)
        return super().step(ids, last) if program is None else program.run(ids, last)

    def draft(self, state: Tensor, ids: Tensor, depth: int) -> Step:
        program = self.program(depth, ids)
        return super().draft(state, ids, depth) if program is None else program.run(ids, 1, state)

    def program(self, depth: int, ids: Tensor) -> Program | None:
        """Return what runs ids (batch, time) through the main layers (depth 0) or an MTP layer, or None."""
        if ids.numel() > MOST_TOKENS or ids.shape[0] > self.cache.latents.shape[1]:  # PyTorch says what is wrong
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return None
        if depth not in self._programs:
            model = self.model
            layers = [model.mtp[depth - 1]] if depth else list(model.model.layers)
            norm = layers[0].shared_head.norm if depth else model.model.norm
            plain = _is_plain(model, layers, norm, self.cache.latents.dtype)
            self._programs[depth] = Program(model, layers, norm, self.cache, self.head) if plain else None
        return self._programs[depth]

    def greedy_pass(
        self, tokens: list[int], states: Tensor, most: int, min_confidence: float, drafter: Drafter | None = None
    ) -> GreedyPass | None:
        """Return what drafts and verifies greedily in one call; None where C cannot, or with several MTP layers.

        Args:
            tokens: the known ones; states: (1, time, hidden) of the main model at all of them but the last.
            most, min_confidence: see `GreedyPass`. drafter: a lighter copy of the MTP layer.
        """
        few = torch.zeros(1, most + 1, dtype=torch.int64)
        main, mtp = (self.program(depth, few) if len(self.model.mtp) == 1 else None for depth in (0, 1))
        if main is None or mtp is None or main.library is not mtp.library:
            return None
        if states.shape[1] > 1:
            self.draft(states[:, :-1], torch.tensor([tokens[1:-1]]), 1)
        matrices, fine = types(self.model.mtp)
        if drafter is not None and matrices == fine:  # 8 bits have no type of their own: that of the norms is taken
            light = drafter.layer
            mtp = Program(self.model, [light], light.shared_head.norm, self.cache, drafter.head)
        return GreedyPass(main, mtp, tokens, states[:, -1:], most, min_confidence)


class Program:
    """Plain layers (see `_is_plain`), and the norm and head after them, as decode.c reads them: where they are."""

    def __init__(
        self, model: MiniDeepSeek, layers: Layers, norm: RMSNorm, cache: LatentCache, head: Tensor | Int8Weight
    ) -> None:
        self.layers, self.config, self.cache, self.head = layers, model.config, cache, head
        first = layers[0]
        self.places = range(first.self_attn.layer, first.self_attn.layer + len(layers))
        self.library = library(*types(layers), cache.latents.dtype)
        self.shape = Shape.of(model.config, first.self_attn.scale)
        self.threads, self.tokens, self.latents = torch.get_num_threads(), 0, None
        self.angles = model.rotary(torch.arange(cache.max_length)[None]).contiguous()
        tensors = {"embedding": model.model.embed_tokens.weight, "norm": norm.weight, "angles": self.angles}
        matrices = {"head": head}
        if isinstance(first, MTPLayer):
            tensors |= {"enorm": first.enorm.weight, "hnorm": first.hnorm.weight}
            matrices["eh_proj"] = first.eh_proj
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        addresses |= {name: _matrix(weight) for name, weight in matrices.items()}
        self.ends = Ends(vocab=model.lm_head.weight.shape[0], **addresses)

    def prepare(self, tokens: int) -> None:
        """Make room for so many tokens, and take new addresses where the cache has let rows go."""
        if tokens > self.tokens:
            self.tokens = tokens
            room = self.library.scratch(ctypes.byref(self.shape), tokens, self.cache.max_length, self.threads)
            self.memory = scratch(room // 4)
        if self.cache.latents is not self.latents:
            self.latents = self.cache.latents
            self.addresses = (Layer * len(self.layers))(*(_layer(layer, self.latents) for layer in self.layers))

    def run(self, ids: Tensor, last: int, state: Tensor | None = None) -> Step:
        """As `EagerRunner.step`, and with a state (batch, time, hidden) as its `draft`; states are float32."""
        batch, time = ids.shape
        self.prepare(batch * time)
        held, padding = self.cache.reserve_rows(self.places, batch, time), self.cache.padding
        states, logits = floats(batch, time, self.config.hidden_size), floats(batch, last, self.ends.vocab)
        choice, confidence = integers(batch, last), floats(batch, last)
        ids = ids.long().contiguous()
        state = None if state is None else state.float().contiguous()
        network = ctypes.byref(self.shape), self.addresses, len(self.layers), self.memory, ctypes.byref(self.ends)
        tensors = (ids, state, states, logits, choice, confidence, padding, held)
        self.library.step(*network, *tensors, batch, time, last, self.cache.max_length, self.threads)
        return Step(states, logits, choice, confidence)


class GreedyPass:
    """Passes of speculative decoding with one MTP layer: drafts and verification in one call of C.

    Args:
        main, mtp: what runs the main model and the MTP layer, over one cache that has room for `most` drafts.
        tokens: the known ones; the main model has read all but the last, the MTP layer has met all but the last two.
        state: (1, 1, hidden) of the main model at the last position that it has read.
        most: drafts a pass; min_confidence: a draft is continued while all of it is accepted with this probability.
    """

    def __init__(
        self, main: Program, mtp: Program, tokens: list[int], state: Tensor, most: int, min_confidence: float
    ) -> None:
        main.prepare(most + 1)
        mtp.prepare(most + 1)
        self.library, self.known, self.fresh = main.library, len(tokens), 1
        capacity, rows, hidden = main.cache.max_length, most + 1, main.config.hidden_size
        self.line, states = (ctypes.c_int64 * (capacity + 1))(*tokens), floats(rows, hidden)
        states[0] = state[0, 0]
        network = ctypes.byref(main.shape), main.memory, main.addresses, len(main.layers), ctypes.byref(main.ends)
        room = states, floats(2 * rows, hidden), floats(rows, main.ends.vocab), floats(1), integers(rows)
        sizes = most, capacity, min_confidence, main.threads
        self.given = *network, mtp.addresses, ctypes.byref(mtp.ends), self.line, *room, *sizes
        self.programs = main, mtp  # what the addresses belong to

    def run(self) -> tuple[list[int], int]:
        """Return the next tokens, the drafts that are accepted and one more, and how many drafts there were."""
        drafted, before = ctypes.c_int64(), self.known
        self.known = self.library.speculate(*self.given, before, self.fresh, ctypes.byref(drafted))
        self.fresh = self.known - before
        return self.line[before : self.known], drafted.value


class Drafter:
    """Copies of the last MTP layer and the head in 8 bits: half the reading, and drafts are verified anyway.

    Whoever generates often makes one and keeps it, while the weights stay as they are.
    """

    @torch.no_grad()
    def __init__(self, model: MiniDeepSeek) -> None:
        layer = model.mtp[-1]
        # Weights are left out of the copy that are quantized below.
        self.layer = copy.deepcopy(layer, {id(weight): weight for weight in layer.parameters() if weight.dim() > 1})
        # Every matrix but the router's, whose choices are made among close numbers.
        for name, module in list(self.layer.named_modules()):
            if isinstance(module, (Experts, nn.Linear)):
                quantize_weights(self.layer, name, Int8Weight.rounded)
        self.head = Int8Weight.rounded(model.lm_head.weight)


def check_vocabulary(ids: Tensor, vocab: int) -> None:
    """Raise IndexError for a prompt that C would read beyond the embedding for."""
    if not 0 <= ids.min() <= ids.max() < vocab:
        raise IndexError(f"a token that is not in the vocabulary of {vocab}")


def types(layers: Layers) -> tuple[torch.dtype, torch.dtype] | None:
    """Return the type of matrices (in 8 bits: of norms) and that of norms and routers, the same or float32; or None."""
    matrices, fine = set(), set()
    for module in (module for layer in layers for module in layer.modules()):
        found = fine if isinstance(module, (RMSNorm, Router)) else matrices
        found.update(weight.dtype for weight in module.parameters(recurse=False))
    matrices = matrices or set(fine)
    if len(matrices) != 1 or len(fine) != 1 or not matrices <= set(TYPES):
        return None
    return (matrices.pop(), fine.pop()) if fine <= matrices | {torch.float32} else None


def _is_plain(model: MiniDeepSeek, layers: Layers, norm: RMSNorm, held: torch.dtype) -> bool:
    """Every module is ours and unhooked, the weights of types that decode.c reads; and decode.c was compiled."""
    ours = {DecoderLayer, MTPLayer, SharedHead, MultiHeadLatentAttention, DeepseekMoE, SwiGLU}
    ours |= {Experts, Router, RMSNorm, Linear, QuantizedLinear, Int8Weight}
    modules = [module for layer in layers for module in layer.modules()]
    found = types(layers) if layers and held in TYPES else None
    if found is None or not all(type(module) in ours for module in modules):
        return False
    ends = {model.model.embed_tokens: (nn.Embedding, found[0]), model.lm_head: (nn.Linear, found[0])}
    ends[norm] = (RMSNorm, found[1])
    if not all(type(module) is kind and module.weight.dtype == dtype for module, (kind, dtype) in ends.items()):
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in (*modules, *ends, model)):
        return False
    if any(module.e_score_correction_bias.dtype != torch.float32 for module in modules if isinstance(module, Router)):
        return False
    weights = [*(weight for layer in layers for weight in layer.parameters()), *(module.weight for module in ends)]
    if not all(type(weight) is nn.Parameter and weight.is_contiguous() for weight in weights):
        return False
    return not any(map(_mixes_bits, layers)) and library(*found, held) is not None


def _mixes_bits(layer: DecoderLayer) -> bool:
    """Some matrices of a layer are in 8 bits, and some are not."""
    parts = [module for module in layer.modules() if type(module) is not Router]
    dense = any(weight.dim() > 1 for module in parts for weight in module.parameters(recurse=False))
    return dense and any(type(module) is Int8Weight for module in parts)


def _layer(layer: DecoderLayer, latents: Tensor) -> Layer:
    """Return the addresses of all weights, and of the layer's part of the cache."""
    attention, mlp = layer.self_attn, layer.mlp
    matrices = {"kv_a": attention.kv_a_proj_with_mqa, "kv_b": attention.kv_b_proj, "o": attention.o_proj}
    tensors = {
        "input_norm": layer.input_layernorm.weight,
        "kv_a_norm": attention.kv_a_layernorm.weight,
        "post_norm": layer.post_attention_layernorm.weight,
        "cache": latents[attention.layer],
    }
    if hasattr(attention, "q_a_proj"):
        matrices |= {"q_a": attention.q_a_proj, "q_b": attention.q_b_proj}
        tensors["q_a_norm"] = attention.q_a_layernorm.weight
    else:
        matrices["q_b"] = attention.q_proj
    tensors |= {f"{name}_bias": matrices[name].bias for name in ("q_a", "kv_a", "o") if name in matrices}
    if layer.is_moe:
        tensors |= {"router": mlp.gate.weight, "router_bias": mlp.gate.e_score_correction_bias}
        matrices |= {"gate_up_experts": mlp.experts.gate_up_proj, "down_experts": mlp.experts.down_proj}
    if (dense := mlp.shared_experts if layer.is_moe else mlp) is not None:
        matrices |= {"gate": dense.gate_proj, "up": dense.up_proj, "down": dense.down_proj}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}
    return Layer(**addresses, **{name: _matrix(matrix) for name, matrix in matrices.items()})


def _matrix(matrix: Tensor | Int8Weight | nn.Linear) -> Matrix:
    if isinstance(matrix, nn.Linear):
        matrix = matrix.quantized if isinstance(matrix, QuantizedLinear) else matrix.weight
    return Matrix.of(matrix.codes, matrix.scales) if isinstance(matrix, Int8Weight) else Matrix.of(matrix)


def main() -> None:
    """Tell whether decoding runs in C here."""
    for dtype in TYPES:
        try:
            print(f"{dtype}: {compiled('decode.c', dtype)}")
        except subprocess.CalledProcessError as error:
            print(f"{dtype}: PyTorch decodes; {' '.join(error.cmd)} failed:\n{error.stderr}", file=sys.stderr)
        except OSError as error:
            print(f"{dtype}: PyTorch decodes; {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
