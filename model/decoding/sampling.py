"""From logits to the next token: penalties, truncation, temperature, uniform numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # tokens summed at a time to find one by its cumulative probability


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
        if self.temperature == 0:
            return self.penalise(logits_BV, seen_BT).argmax(-1)
        return torch.multinomial(self.probabilities(logits_BV, seen_BT), 1, generator=generator).squeeze(1)

    def choose_by_uniform(self, logits_BV: Tensor, seen_BT: Tensor | None, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        """The same from a number in [0, 1) for each row, which greedy choice does not need.

        Returns (batch,) ids and log-probabilities: of the distribution sampled from, or greedily of the model's own.
        """
        if self.temperature == 0:
            logits = self.penalise(logits_BV, seen_BT)
            most, chosen = logits.max(-1)
            return chosen, most - logits.logsumexp(-1)
        probabilities = self.probabilities(logits_BV, seen_BT)
        chosen = inverse_cumulative(probabilities, uniform_B)
        return chosen, probabilities.gather(1, chosen.unsqueeze(1)).squeeze(1).log()

    def probabilities(self, logits_BV: Tensor, seen_BT: Tensor | None = None) -> Tensor:
        """What a token is sampled from, (batch, vocab); the temperature is above 0."""
        logits = self.penalise(logits_BV, seen_BT)
        return self.truncate(logits if self.temperature == 1 else logits / self.temperature).softmax(-1)

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


GREEDY = Sampling(temperature=0.0)


def inverse_cumulative(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token of each row whose cumulative probability exceeds the row's uniform number. (B,) int64.

    Blocks are summed first, then the tokens of one: running sums over all tokens are slow.
    """
    if missing := -probabilities_BV.shape[1] % BLOCK:
        probabilities_BV = F.pad(probabilities_BV, (0, missing))
    blocks_BNK = probabilities_BV.unflatten(1, (-1, BLOCK))
    sums = blocks_BNK.sum(-1)
    # Scaled by what the sum really is after rounding, a number below 1 falls on a token of some probability.
    block, rest = _first_above(sums, uniform_B * sums.cumsum(-1)[:, -1])
    within = blocks_BNK[torch.arange(len(block), device=block.device), block]
    return block * BLOCK + _first_above(within, rest)[0]


def _first_above(weights_BN: Tensor, threshold_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's running sum first exceeds its threshold, by rounding the largest weight; what is left there."""
    cumulative = weights_BN.cumsum(-1)
    found = torch.searchsorted(cumulative, threshold_B.unsqueeze(1), right=True)
    found = torch.where(found < weights_BN.shape[1], found, weights_BN.argmax(-1, keepdim=True))
    before = (cumulative - weights_BN).gather(1, found).squeeze(1)
    return found.squeeze(1), (threshold_B - before).clamp(min=0)
