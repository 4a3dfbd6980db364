"""Learning from preferences: DPO and its relatives over pairs of answers.

x is a prompt, y_w the chosen answer, y_l the rejected one; log pi(y|x) is summed over the tokens of the answer, the one
that ends it included. r = log pi(y|x) - log pi_ref(y|x) is a log-ratio to the reference, beta r the implicit reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError, require
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.log_probs import label_log_probs
from training.losses import IGNORE, INPUTS, PLACES, Batch, Metric, located
from training.machine import autocast, to_device
from training.metrics import Tally
from training.parallel.ranks import Ranks
from training.validation import evaluate

Ask = Callable[[Callable[[MiniDeepSeek], Tensor]], Tensor]  # gives work the model that it asks
SIDES, TOKENS = "sides", "side_tokens"  # in a batch: see `PreferenceLoss.prepare`
CHARACTERS_A_TOKEN = 8  # read at most; text has fewer


class Pairs(NamedTuple):
    """What the losses compare, (pairs,) float32 each: log pi and log pi_ref of both answers, and their tokens."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


@dataclass
class PreferenceSettings:
    """Which loss over the pairs.

    Args:
        loss: sigmoid (DPO), ipo, or simpo, which needs no reference.
        beta: strength of the penalty for leaving the reference; for simpo the scale of the means (2.0 to 2.5).
        label_smoothing: share of the pairs that are taken to be the wrong way round (cDPO); not for ipo.
        gamma: margin that simpo wants between the rewards.
        nll_weight: weight of the mean negative log-probability of the chosen answer's tokens.
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 1.0
    nll_weight: float = 0.2

    def __post_init__(self) -> None:
        require(self.loss in LOSSES, f"--preference.loss {self.loss}: one of {', '.join(LOSSES)}")
        require(self.beta > 0, f"--preference.beta {self.beta}: must be positive")
        smoothing = f"--preference.label_smoothing {self.label_smoothing}"
        require(0 <= self.label_smoothing < 0.5, f"{smoothing}: must be at least 0 and below 0.5")
        require(not self.label_smoothing or self.loss != "ipo", f"{smoothing}: ipo has none; leave it at 0")
        require(self.nll_weight >= 0, f"--preference.nll_weight {self.nll_weight}: must be at least 0")

    @property
    def needs_reference(self) -> bool:
        return self.loss != "simpo"


def smoothed(margin: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid(m), of which a share `smoothing` for the pair the other way round (Mitchell 2023, cDPO)."""
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def sigmoid_dpo(pairs: Pairs, settings: PreferenceSettings) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigmoid(beta r_w - beta r_l) (Rafailov et al. 2023, Eq. 7). Returns losses and both rewards, (pairs,)."""
    chosen = settings.beta * (pairs.chosen - pairs.reference_chosen)
    rejected = settings.beta * (pairs.rejected - pairs.reference_rejected)
    return smoothed(chosen - rejected, settings.label_smoothing), chosen, rejected


def ipo(pairs: Pairs, settings: PreferenceSettings) -> tuple[Tensor, Tensor, Tensor]:
    """(r_w - r_l - 1 / (2 beta))^2 (Azar et al. 2023, Eq. 17), r a mean over the tokens, as TRL has it."""
    chosen = (pairs.chosen - pairs.reference_chosen) / pairs.chosen_tokens
    rejected = (pairs.rejected - pairs.reference_rejected) / pairs.rejected_tokens
    losses = (chosen - rejected - 1 / (2 * settings.beta)).square()
    return losses, settings.beta * chosen, settings.beta * rejected


def simpo(pairs: Pairs, settings: PreferenceSettings) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigmoid(beta log pi(y_w) / |y_w| - beta log pi(y_l) / |y_l| - gamma) (Meng et al. 2024, Eq. 6)."""
    chosen = settings.beta * pairs.chosen / pairs.chosen_tokens
    rejected = settings.beta * pairs.rejected / pairs.rejected_tokens
    return smoothed(chosen - rejected - settings.gamma, settings.label_smoothing), chosen, rejected


PairLoss = Callable[[Pairs, PreferenceSettings], tuple[Tensor, Tensor, Tensor]]
LOSSES: dict[str, PairLoss] = {"sigmoid": sigmoid_dpo, "ipo": ipo, "simpo": simpo}


@dataclass
class PreferenceLoss:
    """A loss over packed pairs: segments 2k and 2k + 1 of a row are a chosen and a rejected conversation.

    Both answers of all pairs go through the model in one pass. Sums are over pairs and divided by their number.

    Attributes:
        reference: frozen model for batches that do not have its log-probabilities in `reference`; None for simpo.
    """

    settings: PreferenceSettings
    reference: Ask | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Metric]]:
        """Return the sum over pairs, their number, and what is logged.

        `main` is the loss without the term of the chosen answer, `nll` that term a token, `kl` half the squared
        log-ratio of a token of the chosen answer: near the reference this is the divergence from it (Schulman 2020,
        k2), were the answer drawn from the policy.
        """
        batch = batch if SIDES in batch else self.prepare(batch)
        log_probs = answer_log_probs(model, batch)
        known = torch.zeros_like(log_probs)  # where nothing is compared with a reference
        if self.settings.needs_reference:
            with torch.no_grad():
                if "reference" in batch:
                    known = batch["reference"]
                else:
                    known = self.reference(lambda reference: answer_log_probs(reference, batch))
        tokens = batch[TOKENS]
        drift = (log_probs - known).detach().square() / 2
        values = torch.stack([log_probs, known, drift])
        (chosen, rejected), reference, (chosen_drift, _) = sums_by_side(values, batch[SIDES], tokens.numel()).unbind(0)
        pairs = Pairs(chosen, rejected, *reference, *tokens)
        losses, reward_chosen, reward_rejected = LOSSES[self.settings.loss](pairs, self.settings)
        # Pang et al. 2024 (arXiv 2404.19733), Eq. 1: -log pi(y_w|x) / |y_w| keeps the chosen answer likely.
        total = (losses - self.settings.nll_weight * chosen / pairs.chosen_tokens).sum()
        margin = (reward_chosen - reward_rejected).detach()
        metrics: dict[str, Metric] = {
            "main": losses.detach().sum(),
            "accuracy": (margin > 0).float().sum() + 0.5 * (margin == 0).float().sum(),
            "margin": margin.sum(),
            "chosen_log_prob": chosen.detach().sum(),
            "rejected_log_prob": rejected.detach().sum(),
            "nll": (-chosen.detach().sum(), pairs.chosen_tokens.sum()),
        }
        if self.settings.needs_reference:
            metrics["kl"] = (chosen_drift.sum(), pairs.chosen_tokens.sum())
        return total, torch.full((), len(losses), device=total.device), metrics

    def prepare(self, batch: Batch) -> Batch:
        """Add where the labels are, which conversation each position is of, and the tokens compared of each."""
        sides, count = sides_of(batch["segment_ids"])
        counted = (batch["labels"] != IGNORE).float().unsqueeze(0)
        return {**located(batch), SIDES: sides, TOKENS: sums_by_side(counted, sides, count)[0]}


def whole(model: MiniDeepSeek) -> Ask:
    """Return what asks a model that is here."""
    return lambda work: work(model)


def answer_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """Return log pi of every label, (rows, time) float32, 0 where nothing counts."""
    out = model(**{name: batch[name] for name in INPUTS if name in batch})
    return label_log_probs(out.hidden, out.head, batch["labels"], places=batch.get(PLACES))


def sides_of(segments: Tensor) -> tuple[Tensor, int]:
    """Number the conversations of packed pairs from one row to the next: (rows, time) int64, and how many there are.

    segments: (rows, time); -1 is padding, which is given the number of any conversation.
    """
    ends = (segments.amax(1) + 1).cumsum(0)
    count = int(ends[-1])
    begins = ends - segments.amax(1) - 1
    return (begins.unsqueeze(1) + segments.clamp(min=0)).clamp(max=count - 1), count


def sums_by_side(values: Tensor, sides: Tensor, count: int) -> Tensor:
    """Sums over each conversation: (quantities, rows, time) of packed pairs to (quantities, chosen or rejected, pairs).

    sides, count: from `sides_of`. What padding holds must be 0.
    """
    sums = torch.zeros(len(values), count, device=values.device)
    return sums.index_add(1, sides.flatten(), values.flatten(1)).view(len(values), -1, 2).transpose(1, 2)


@dataclass(frozen=True)
class HeldOutPairs:
    """Validation: how often, and by how much, the chosen answer of held-out pairs is preferred.

    Attributes:
        pairs, text: held-out batches; either may be empty. token_bytes: (vocab,) bytes of each token.
        names: of the data, for the log: {"pairs": ..., "text": ...}.
    """

    loss: PreferenceLoss
    pairs: Sequence[Batch]
    text: Sequence[Batch]
    token_bytes: np.ndarray
    names: dict[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, model: MiniDeepSeek, dtype: torch.dtype, ranks: Ranks) -> dict[str, Any]:
        """`val_` and the names of what is logged in training; with text `val_bits_per_byte`."""
        entry: dict[str, Any] = {}
        if self.pairs:
            tally = Tally()
            starts = range(0, len(self.pairs), ranks.world)
            stops = ranks.asked_to_stop if ranks.in_step else None
            for start in ranks.watch.track(starts, "validating pairs", len(starts), stops):
                mine = start + ranks.rank
                # A rank that has none left measures one again and adds nothing: all ranks must have the same names.
                batch, share = self.pairs[mine % len(self.pairs)], float(mine < len(self.pairs))
                with autocast(dtype, ranks.device):
                    _, count, metrics = self.loss(model, to_device(self.loss.prepare(batch), ranks.device))
                measured = {"count": count, **metrics}.items()
                tally.add(
                    {name: tuple(share * x for x in m) if isinstance(m, tuple) else share * m for name, m in measured}
                )
            sums = tally.gather(ranks)
            means = sums.means(max(sums.take("count"), 1))
            entry = {"val_loss": means.pop("main"), **{f"val_{name}": value for name, value in means.items()}}
        if self.text:
            entry["val_bits_per_byte"] = evaluate(model, self.text, self.token_bytes, dtype, ranks)["val_bits_per_byte"]
        return {**entry, "held_out": self.names} if self.names else entry


def text_batches(
    path: Path, tokenizer: Tokenizer, sequence_length: int, most_tokens: int, micro_tokens: int
) -> list[Batch]:
    """Return a text file in windows of `sequence_length`, each token once; at most the first `most_tokens`.

    Raises `UserError` for a file that cannot be read or is empty.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            ids = tokenizer.encode(file.read(CHARACTERS_A_TOKEN * most_tokens))[:most_tokens]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--val_text {path}: cannot be read ({error}); give a UTF-8 text file") from None
    if not ids:
        raise UserError(f"--val_text {path}: empty; give a file with text")
    # The text follows the end of another document, as in pretraining.
    rows = -(-len(ids) // sequence_length)
    inputs = torch.full((rows * sequence_length,), tokenizer.eos_id)
    labels = torch.full_like(inputs, IGNORE)
    labels[: len(ids)] = torch.tensor(ids)
    inputs[1 : len(ids)] = labels[: len(ids) - 1]
    inputs, labels = inputs.view(rows, sequence_length), labels.view(rows, sequence_length)
    size = max(micro_tokens // sequence_length, 1)
    return [{"input_ids": inputs[i : i + size], "labels": labels[i : i + size]} for i in range(0, len(labels), size)]
