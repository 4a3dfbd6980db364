"""The clipped policy-gradient losses of group-relative policy optimisation: GRPO, DAPO and Dr. GRPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errors import UserError
from training.alignment.prompt_latents import PromptLatents
from training.log_probs import log_probs_and_entropy
from training.losses import IGNORE, PLACES, Batch, Metric, located

LOSSES = ("grpo", "dapo", "dr_grpo")


def completion_hidden(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The states that predict each token of each completion, (rows, new, hidden), and the head (vocab, hidden).

    Each prompt goes through the network once, and the completions of its group after it.

    Args:
        batch: prompt_ids (prompts, time), padded on the left by prompt_padding (prompts,); prompt_of (rows,), which
            prompt each completion continues; input_ids (rows, new - 1), the completions without their last token;
            perhaps prompt_experts and experts, of both, that sampling chose (see `MiniDeepSeek.forward`).
    """
    prompts, of = PromptLatents(batch["prompt_padding"]), batch["prompt_of"]
    of_prompts, own = ({"experts": batch[name]} if name in batch else {} for name in ("prompt_experts", "experts"))
    first = model(batch["prompt_ids"], cache=prompts, **of_prompts)
    rest = model(batch["input_ids"], cache=prompts.continued(of), **own)
    return torch.cat((first.hidden[:, -1:].index_select(0, of), rest.hidden), dim=1), rest.head


@dataclass
class GRPOLoss:
    """The clipped surrogate with a KL term, a sum over the tokens of completions.

    rho_t = pi(o_t) / pi_old(o_t);  J_t = min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) - beta KL_t
    KL_t = pi_ref / pi - log(pi_ref / pi) - 1, the unbiased k3 estimate   (Shao et al. 2024, Eq. 3 and 4)

    The losses differ in what a token weighs:
        grpo      1 / (completions * |o_i|): each completion the same  (DeepSeekMath, Shao et al. 2024, Eq. 3)
        dapo      1 / (tokens of all completions): each token the same (DAPO, Yu et al. 2025, Eq. 8)
        dr_grpo   1 / (completions * longest allowed): no bias by length (Dr. GRPO, Liu et al. 2025, section 3.2)

    A group without variance adds nothing to the sum but stays in the count, as in these formulas.

    Args:
        longest: most tokens of a completion. temperature: of the sampling; the policy's probabilities are taken at it.
    """

    kind: str
    longest: int
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise UserError(f"--loss {self.kind}: one of {', '.join(LOSSES)}")

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Metric]]:
        """The loss sum, its count, and what is logged; each metric has the completions' tokens as its count.

        Args:
            batch: what `completion_hidden` reads; labels (rows, new), the completions' tokens, -100 after the end;
                sampled_log_probs (rows, new); advantages (rows,); absent (2,), completions and tokens left out
                without variance; perhaps old_log_probs and reference_log_probs (rows, new). Without old ones the
                policy is the one that sampled.
        """
        labels = batch["labels"]
        hidden, head = completion_hidden(model, batch)
        log_p, entropy = log_probs_and_entropy(hidden, head, labels, self.temperature, batch.get(PLACES))
        counted = labels != IGNORE
        old = batch.get("old_log_probs", log_p.detach())
        ratio = (log_p - old).exp()
        advantage = batch["advantages"].unsqueeze(1)
        plain, clipped = ratio * advantage, ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantage
        per_token = -torch.minimum(plain, clipped)
        tokens = counted.sum()
        metrics: dict[str, Metric] = {
            "clip_share": (((clipped < plain) & counted).sum(), tokens),
            "entropy": (entropy.sum(), tokens),
            "mismatch": (((log_p.detach() - batch["sampled_log_probs"]).abs() * counted).sum(), tokens),
        }
        if self.beta:
            log_ratio = batch["reference_log_probs"] - log_p
            kl = log_ratio.exp() - log_ratio - 1
            per_token = per_token + self.beta * kl
            metrics["kl"] = ((kl.detach() * counted).sum(), tokens)
        per_token = per_token * counted
        rows, absent = torch.full((), len(labels), device=labels.device), batch["absent"]
        if self.kind == "grpo":
            total = (per_token.sum(1) / counted.sum(1).clamp(min=1)).sum()
            count = rows + absent[0]
        elif self.kind == "dapo":
            total, count = per_token.sum(), tokens + absent[1]
        else:
            total, count = per_token.sum(), (rows + absent[0]) * self.longest
        return total, count, metrics

    def prepare(self, batch: Batch) -> Batch:
        """Add where the labels are."""
        return located(batch)
