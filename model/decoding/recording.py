"""Completions with the experts that the routers chose for each of their tokens, to be replayed in training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.decoding.eager import EagerRunner
from model.decoding.engine import Engine
from model.decoding.scheduler import Completion, Prompt

if TYPE_CHECKING:
    from model.transformer import MiniDeepSeek

UNKNOWN = -1  # an expert that nobody asked for


class RecordingEngine(Engine):
    """An `Engine` that records what its routers choose, in prefill and in steps.

    In PyTorch: neither decode.c nor a CUDA graph says what it chose.
    """

    def __init__(self, model: MiniDeepSeek, slots: int, max_length: int) -> None:
        super().__init__(model, slots, max_length)
        self.runner = EagerRunner(model, self.cache)
        self._prompts: dict[tuple[int, ...], Tensor] = {}
        self._steps: defaultdict[Completion, list[Tensor]] = defaultdict(list)

    def experts(self, completion: Completion) -> Tensor:
        """(positions, MoE layers, K) int16 on the host: of the prompt and of all its tokens but the last, which is
        never read. `UNKNOWN` in the last layer of a prompt, which is computed for its last position only."""
        prompt = self._prompts[completion.request.prompt]
        return torch.cat((prompt, *(step.unsqueeze(0) for step in self._steps[completion]))).cpu()

    def _decode(self) -> Tensor:
        with _chosen(self.model) as layers:
            logits = super()._decode()
        rows_NLK = torch.stack([chosen for (chosen,) in layers], dim=1).short()
        # Further rows only fill the step up.
        for completion, row_LK in zip(self.scheduler.running, rows_NLK, strict=False):
            self._steps[completion].append(row_LK)
        return logits

    def _prefill(self, prompts: list[Prompt]) -> None:
        with _chosen(self.model) as layers:
            super()._prefill(prompts)
        *layers, last_NK = [torch.cat(parts).short() for parts in layers]
        layers = [chosen.unflatten(0, (len(prompts), -1)) for chosen in layers]
        for row, prompt in enumerate(prompts):
            known = last_NK.new_full((len(prompt.ids), len(layers) + 1, last_NK.shape[-1]), UNKNOWN)
            for layer, chosen_NTK in enumerate(layers):
                known[:, layer] = chosen_NTK[row, : len(prompt.ids)]
            known[-1, -1] = last_NK[row]
            self._prompts[prompt.ids] = known


@contextmanager
def _chosen(model: MiniDeepSeek) -> Iterator[list[list[Tensor]]]:
    """Collect, of each MoE layer of the main model, the (N, K) experts of each pass in the meantime.

    With a hook on each router no runner leaves PyTorch.
    """
    routers = [layer.mlp.gate for layer in model.model.layers if layer.is_moe]
    layers: list[list[Tensor]] = [[] for _ in routers]
    hooks = [
        router.register_forward_hook(lambda _, __, out, chosen=chosen: chosen.append(out[1]))
        for router, chosen in zip(routers, layers, strict=True)
    ]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()
