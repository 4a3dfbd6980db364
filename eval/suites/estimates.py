"""Shares with their uncertainty, and the estimators over several samples of an answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

Z = 1.959964  # of a two-sided 95% interval


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of `count` items (Wilson 1927); (0, 1) where nothing was measured.

    For means of values between 0 and 1 it errs on the safe side: their variance is at most share * (1 - share).
    """
    if not count:
        return 0.0, 1.0
    width = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    middle, scale = share + Z**2 / (2 * count), 1 + Z**2 / count
    return max((middle - width) / scale, 0.0), min((middle + width) / scale, 1.0)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k samples is right, from n of which c are: 1 - C(n-c, k) / C(n, k), without bias.

    Chen et al. 2021 (Codex), Eq. 1. k must not be above `samples`.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(answers: Sequence[Hashable | None], right: Hashable) -> float:
    """Whether the most frequent of the answers is the right one: 1 or 0, and 1/t where it is one of t with most votes.

    None has no vote. (Self-consistency, Wang et al. 2022.)
    """
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    return 1 / len(winners) if right in winners else 0.0
