"""From logits to the next token: penalties, truncation, temperature, chance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The filters apply in the order of the fields, as in transformers.

    Args:
        repetition_penalty: above 1, tokens that already occurred are made less likely (Keskar et al. 2019); 1 is off.
        temperature: 0 is greedy; logits are divided by it.
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the smallest set of tokens with this much probability (Holtzman et al. 2020); 1 is off.
        min_p: keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024); 0 is off.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"{self}: temperature and top_k are at least 0, top_p is in (0, 1], min_p in [0, 1]")
        if self.repetition_penalty <= 0:
            raise ValueError(f"{self}: repetition_penalty must be positive")

    def choose(self, logits_BV: Tensor, seen_BT: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """logits: (batch, vocab) float32; seen: (batch, time) earlier tokens, for the penalty. Returns (batch,) ids."""
        logits = self.penalise(logits_BV, seen_BT)
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(1)

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """(batch, vocab) what sampling draws from, after any penalty; the temperature is above 0."""
        return self.truncate(logits_BV / self.temperature).softmax(-1)

    def penalise(self, logits_BV: Tensor, seen_BT: Tensor | None) -> Tensor:
        """Divide positive and multiply negative logits of the tokens seen."""
        if self.repetition_penalty == 1.0 or seen_BT is None:
            return logits_BV
        scores = logits_BV.gather(1, seen_BT)
        scores = torch.where(scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty)
        return logits_BV.scatter(1, seen_BT, scores)

    def truncate(self, logits_BV: Tensor) -> Tensor:
        """-inf for every token that top-k, top-p or min-p leaves out; the likeliest token always stays."""
        if 0 < self.top_k < logits_BV.shape[-1]:
            least = logits_BV.topk(self.top_k, dim=-1).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
        if self.top_p < 1:
            ordered, order = logits_BV.sort(dim=-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            out = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= self.top_p)
            logits_BV = logits_BV.masked_fill(out, float("-inf"))
        if self.min_p > 0:
            probabilities = logits_BV.softmax(-1)
            least = self.min_p * probabilities.max(-1, keepdim=True).values
            logits_BV = logits_BV.masked_fill(probabilities < least, float("-inf"))
        return logits_BV
