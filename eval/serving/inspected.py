"""A request whose every token is looked into: experts, router scores, MTP's drafts, the size of the cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model import MiniDeepSeek
from model.cache import LatentCache, cache_dtype
from model.costs import count
from model.decoding.eager import EagerRunner
from model.decoding.sampling import GREEDY, Sampling
from model.decoding.scheduler import Request
from model.decoding.speculative import DraftChain, Verifier
from model.moe import DeepseekMoE

DIGITS = 4


class Inside(NamedTuple):
    """What the network did for one token.

    Attributes:
        experts: of each MoE layer its number, the chosen experts, their weights, and all of the router's scores.
        draft: what the first MTP layer had drafted for this place; None without MTP, and for the first token.
        position: how many tokens the cache holds now.
    """

    experts: list[dict[str, Any]]
    draft: int | None
    position: int

    def cache(self, model: MiniDeepSeek) -> dict[str, int]:
        """Return the bytes in bfloat16 of the cache so far, and of what multi-head attention would hold."""
        costs = count(model.config)
        return {"mla_bytes": self.position * costs.cache_bytes, "mha_bytes": self.position * costs.mha_cache_bytes}


class InspectedRun:
    """One request decoded in plain PyTorch, one token a `step`, in the order of `model.decoding.engine.Engine`.

    The MTP layer drafts each next token beforehand; the token is chosen without regard to it.
    """

    def __init__(self, model: MiniDeepSeek, request: Request) -> None:
        self.model, self.request = model, request
        self.tokens, self.made = list(request.prompt), 0
        device = model.lm_head.weight.device
        length = len(self.tokens) + request.max_new_tokens + 2
        self.cache = LatentCache(model.config, 1, length, cache_dtype(model), device, mtp=bool(model.mtp))
        self.runner = EagerRunner(model, self.cache)
        self.chain = DraftChain(self.runner, Verifier(GREEDY, None), 1) if model.mtp else None
        self.states: Tensor | None = None

    @torch.inference_mode()
    def step(self) -> tuple[int, str, Tensor, Inside]:
        """Return the next token, how it ends the reply (as `Completion.finish`), (vocab,) logits, and the inside."""
        first = self.states is None
        drafts = [] if first or self.chain is None else self.chain.draft(self.states, self.tokens)[0]
        ids = self.tokens if first else self.tokens[-1:]
        with router_inputs(self.model) as inputs:
            made = self.runner.step(torch.tensor([ids], device=self.cache.latents.device))
        self.states, logits = made.states, made.logits[:, -1]
        token = self._choose(self.request.sampling, logits)
        self.tokens.append(token)
        self.made += 1
        finish = "stop" if token in self.request.stop else ""
        if not finish and self.made == self.request.max_new_tokens:
            finish = "length"
        inside = Inside(_experts(inputs), drafts[0] if drafts else None, self.cache.length)
        return token, finish, logits[0], inside

    def _choose(self, sampling: Sampling, logits: Tensor) -> int:
        uniform = 0.0 if sampling.temperature == 0 else float(self.request.uniforms[self.made])
        seen = torch.tensor([self.tokens], device=logits.device)
        return int(sampling.choose_by_uniform(logits, seen, torch.tensor([uniform], device=logits.device))[0])


@contextmanager
def router_inputs(model: MiniDeepSeek) -> Iterator[dict[int, tuple[DeepseekMoE, Tensor]]]:
    """Collect, of each MoE layer, itself and the (1, hidden) input of the last position while a pass runs."""
    inputs: dict[int, tuple[DeepseekMoE, Tensor]] = {}

    def collect(number: int, moe: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[number] = moe, arguments[0][0, -1:]

    layers = [(number, layer.mlp) for number, layer in enumerate(model.model.layers) if layer.is_moe]
    # Bound now: `number` and `moe` change in the loop.
    hooks = [
        moe.register_forward_pre_hook(lambda moe, arguments, number=number: collect(number, moe, arguments))
        for number, moe in layers
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _experts(inputs: dict[int, tuple[DeepseekMoE, Tensor]]) -> list[dict[str, Any]]:
    """Compute the routers' choices from their inputs, by the plain lines of the paper."""
    found = []
    for number, (moe, x) in sorted(inputs.items()):
        weights, indices, scores = moe.gate(x)
        weight_of = dict(zip(indices[0].tolist(), weights[0].tolist(), strict=True))
        chosen = sorted(weight_of, key=weight_of.__getitem__, reverse=True)
        found.append(
            {
                "layer": number,
                "chosen": chosen,
                "weights": [round(weight_of[expert], DIGITS) for expert in chosen],
                "scores": [round(score, DIGITS) for score in scores[0].tolist()],
            }
        )
    return found
