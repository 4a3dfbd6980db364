"""The advantages of group-relative policy optimisation: how much better than its group each completion is."""

from __future__ import annotations

from torch import Tensor

EQUAL = 1e-6  # rewards of a group that differ by less are the same: rounding of a weighted sum
EPSILON = 1e-4  # added to a standard deviation


def advantages(rewards_PG: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Return the advantages (P, G) of float32 rewards, and which groups have zero variance, (P,) bool.

    A_i = (r_i - mean(r)) / std(r)   (GRPO: Shao et al. 2024, section 4.1.2; DAPO: Yu et al. 2025, Eq. 9)
    A_i = r_i - mean(r)              (Dr. GRPO: Liu et al. 2025: the division favours the easiest and hardest prompts)
    """
    zero_variance_P = rewards_PG.amax(1) - rewards_PG.amin(1) < EQUAL
    advantages_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if loss != "dr_grpo":
        advantages_PG = advantages_PG / (rewards_PG.std(1, keepdim=True) + EPSILON)
    return advantages_PG.masked_fill(zero_variance_P.unsqueeze(1), 0.0), zero_variance_P
