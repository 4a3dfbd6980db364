"""What runs a model over a latent cache: one interface for PyTorch, C and CUDA graphs, and the choice among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from model.cache import LatentCache
from model.decoding.cuda_graph import GraphRunner, fits_graph
from model.decoding.eager import EagerRunner, Step
from model.decoding.native import Drafter, GreedyPass, NativeRunner

if TYPE_CHECKING:
    from model.transformer import MiniDeepSeek


class Runner(Protocol):
    """A model over a cache, without gradients. While one is in use the weights stay as they are, and where they are.

    Attributes:
        any_rows: steps of up to so many rows take any number; of more, those of a few sizes are faster.
    """

    any_rows: int

    def prefill(self, ids: Tensor, last_positions: Tensor | None = None) -> Tensor:
        """Read prompts, some rows at a time.

        Args:
            ids: (batch, time), of as many rows as the cache; the positions are added to it.
            last_positions: (batch,) where the last token of each row is; by default in the last column.
        Returns:
            (batch, vocab) float32 logits of what follows them.
        """

    def step(self, ids: Tensor, last: int = 1) -> Step:
        """Read ids (batch, time), which follow what the cache holds. Return logits of the `last` positions."""

    def draft(self, state: Tensor, ids: Tensor, depth: int) -> Step:
        """Let the MTP layer `depth` (1 .. D) join state (batch, time, hidden) with ids (batch, time).

        They are the tokens `depth` places after each position; the logits of the last position are about the token
        after those. The cache has room for MTP.
        """

    def greedy_pass(
        self, tokens: list[int], states: Tensor, most: int, min_confidence: float, drafter: Drafter | None = None
    ) -> GreedyPass | None:
        """Return what drafts and verifies greedily in one call, or None where there is none.

        Args:
            tokens: the known ones; states: (1, time, hidden) of the main model at all of them but the last.
            most, min_confidence: see `GreedyPass`. drafter: a lighter copy of the MTP layer.
        """


def runner_for(model: MiniDeepSeek, cache: LatentCache, static: bool = False) -> Runner:
    """Return what is fastest here. static: steps of one shape, on CUDA as a graph, where that can be."""
    device = cache.latents.device
    if static and fits_graph(model, cache.latents.dtype, device):
        return GraphRunner(model, cache)
    return NativeRunner(model, cache) if device.type == "cpu" else EagerRunner(model, cache)
