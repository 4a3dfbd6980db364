"""One step of decoding, from tokens to logits: one call of decode.c where that is possible, PyTorch elsewhere."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.cache import LatentCache
from model.decoding import native
from model.kernels.compiled import floats, integers
from model.kernels.structs import Ends, Matrix, weight_of
from model.layer import DecoderLayer
from model.norm import RMSNorm
from model.quantized import Int8Weight
from model.transformer import MiniDeepSeek, logits


class Step(NamedTuple):
    """What a step gives.

    Attributes:
        states: (batch, time, hidden) before the final norm, which is what MTP continues from.
        logits: (batch, last, vocab) float32 of each row's last positions.
        choice: (batch, last) their likeliest tokens; confidence: (batch, last) how likely these are.
    """

    states: Tensor
    logits: Tensor
    choice: Tensor
    confidence: Tensor


def read(model: MiniDeepSeek, ids: Tensor, cache: LatentCache, last: int = 1) -> Step:
    """The main model reads ids (batch, time), which follow what the cache holds. Logits for the `last` positions."""
    if (fast := stepper(model, model.model.layers, model.model.norm, ids, cache)) is not None:
        return fast.run_step(ids, last)
    out = model(ids, cache=cache)
    return _step(out.state, logits(out.hidden[:, -last:], out.head))


def draft(model: MiniDeepSeek, state: Tensor, ids: Tensor, depth: int, cache: LatentCache) -> Step:
    """The MTP layer `depth` (1 .. D) joins state (batch, time, hidden) with ids (batch, time), the tokens `depth`
    places after each position; logits of the last position are about the token after those. The cache has room for MTP.
    """
    layer = model.mtp[depth - 1]
    if (fast := stepper(model, [layer], layer.shared_head.norm, ids, cache)) is not None:
        return fast.run_step(ids, 1, state)
    found, state = model.draft(state.to(model.lm_head.weight.dtype), ids, depth, cache)
    return _step(state, found)


def _step(states: Tensor, found: Tensor) -> Step:
    confidence, choice = found.softmax(-1).max(-1)
    return Step(states, found, choice, confidence)


class Stepper(native.Decoder):
    """Layers with what is before and after them: the embedding, an MTP layer's join, the norm and the head."""

    def __init__(
        self,
        model: MiniDeepSeek,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        cache: LatentCache,
        head: Tensor | Int8Weight,
    ) -> None:
        super().__init__(layers, model.config, cache)
        positions = torch.arange(cache.max_length)[None]
        self.angles = torch.view_as_real(model.rotary(positions)).contiguous()
        tensors = {"embedding": model.model.embed_tokens.weight, "norm": norm.weight, "angles": self.angles}
        matrices = {"head": head}
        if hasattr(layers[0], "eh_proj"):
            mtp = layers[0]
            tensors |= {"enorm": mtp.enorm.weight, "hnorm": mtp.hnorm.weight}
            matrices |= {"eh_proj": weight_of(mtp.eh_proj)}
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        addresses |= {name: Matrix.of(weight) for name, weight in matrices.items()}
        self.head = head  # what else the addresses belong to, the model and the layers keep
        self.ends = Ends(vocab=model.lm_head.weight.shape[0], **addresses)

    def run_step(self, ids: Tensor, last: int, state: Tensor | None = None) -> Step:
        """As `read`, and with a state (batch, time, hidden) as `draft`; states are float32."""
        batch, time = ids.shape
        self.prepare(batch * time)
        held, padding = self.cache.reserve_rows(self.places, batch, time), self.cache.padding
        states, found = floats(batch, time, self.config.hidden_size), floats(batch, last, self.ends.vocab)
        choice, confidence = integers(batch, last), floats(batch, last)
        ids = ids.long().contiguous()
        state = None if state is None else state.float().contiguous()
        self.library.step(
            ctypes.byref(self.shape),
            self.addresses,
            len(self.layers),
            ctypes.byref(self.scratch),
            ctypes.byref(self.ends),
            ids.data_ptr(),
            None if state is None else state.data_ptr(),
            states.data_ptr(),
            found.data_ptr(),
            choice.data_ptr(),
            confidence.data_ptr(),
            None if padding is None else padding.data_ptr(),
            held.data_ptr(),
            batch,
            time,
            last,
            self.cache.max_length,
            self.threads,
        )
        return Step(states, found, choice, confidence)


def stepper(
    model: MiniDeepSeek, layers: Sequence[DecoderLayer], norm: RMSNorm, ids: Tensor, cache: LatentCache
) -> Stepper | None:
    """What runs these layers and their ends in C, or None; see `native.decoder` and `_plain_ends`."""
    if torch.is_autocast_enabled("cpu") or native.decoder(layers, model.config, ids, cache) is None:
        return None
    place = layers[0].self_attn.layer
    if place not in cache.steppers:
        plain = _plain_ends(model, layers, norm)
        cache.steppers[place] = Stepper(model, layers, norm, cache, model.lm_head.weight) if plain else None
    return cache.steppers[place]


def _plain_ends(model: MiniDeepSeek, layers: Sequence[DecoderLayer], norm: RMSNorm) -> bool:
    """Embedding, norm and head are ours, unhooked, and of the types of the layers."""
    embedding, head, (matrix, fine) = model.model.embed_tokens, model.lm_head, native.types(layers)
    wanted = {embedding: (nn.Embedding, matrix), head: (nn.Linear, matrix), norm: (RMSNorm, fine)}
    for module, (kind, dtype) in wanted.items():
        weight = module.weight
        plain = type(module) is kind and type(weight) is nn.Parameter and weight.is_contiguous()
        if not plain or weight.dtype != dtype or module._forward_hooks or module._forward_pre_hooks:
            return False
    return head.bias is None and not model._forward_hooks and not model._forward_pre_hooks
