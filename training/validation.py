"""Held-out loss in bits per byte, which does not depend on the tokenizer; names that tell on what it was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from model import MiniDeepSeek
from text.sources.registry import Source
from text.tokenizer import SPECIAL_TOKENS, Tokenizer, characters
from training.losses import IGNORE, Batch, token_losses
from training.machine import autocast
from training.parallel.ranks import Ranks

if TYPE_CHECKING:
    from text.chats.problems import Problem

MOST_FILES = 3  # whose names are part of the name
# What each measure of held-out data is measured on: a name of an entry's `held_out`.
MEASURED_ON = {
    "val_bits_per_byte": "text",
    "val_preferred": "pairs",
    "val_margin": "pairs",
    "val_accuracy": "problems",
    "val_pass_1": "problems",
}


class Validation(Protocol):
    """What a stage measures on held-out data: numbers for the log, by names that begin with `val_`.

    `held_out` in it names the data: {"text" or "pairs" or "problems": see `labels_name`}.

    Called on all ranks together, with the model in evaluation mode, which it must leave as it was. After a signal, at
    which `Watch.track` ends, what it returns is not used.
    """

    def __call__(self, model: MiniDeepSeek, dtype: torch.dtype, ranks: Ranks) -> dict[str, Any]: ...


class HeldOutRows(Protocol):
    """A data set of held-out samples, in order."""

    sequence_length: int

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Batch: ...


def held_out_batches(dataset: HeldOutRows, most_tokens: int, micro_tokens: int) -> list[Batch]:
    """Return the samples in batches of `micro_tokens`; if there are more than `most_tokens`, evenly spread ones."""
    count = max(min(len(dataset), most_tokens // dataset.sequence_length), 1)
    rows = [index * len(dataset) // count for index in range(count)]
    size = max(micro_tokens // dataset.sequence_length, 1)
    return [dataset.batch(rows[start : start + size]) for start in range(0, count, size)]


@dataclass(frozen=True)
class BitsPerByte:
    """Validation of the next-token stages: held-out bits per byte, nats per token and expert loads.

    Attributes:
        batches: of held-out samples; token_bytes: (vocab,) bytes of each token.
        names: of the samples, for the log: {"text": ...}.
    """

    batches: Sequence[Batch]
    token_bytes: np.ndarray
    names: dict[str, str] = field(default_factory=dict)

    def __call__(self, model: MiniDeepSeek, dtype: torch.dtype, ranks: Ranks) -> dict[str, Any]:
        measured = evaluate(model, self.batches, self.token_bytes, dtype, ranks)
        return {**measured, "held_out": self.names} if self.names else measured


@torch.no_grad()
def evaluate(
    model: MiniDeepSeek, batches: Iterable[Batch], token_bytes: np.ndarray, dtype: torch.dtype, ranks: Ranks
) -> dict[str, Any]:
    """Measure the summed -log2 p of the labels over the bytes that they stand for, over all ranks.

    Returns `val_bits_per_byte`, `val_loss` in nats per token and, of a model with experts, `expert_load`: each one's
    share of its layer's.

    Args:
        batches: the same on every rank; each rank takes its share of them.
        token_bytes: (vocab,) bytes of each token; special tokens stand for none, but their loss counts.
    """
    sizes = torch.from_numpy(np.ascontiguousarray(token_bytes)).to(ranks.device)
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    moe_layers = sum(layer.is_moe for layer in model.model.layers)
    counts_LE = torch.zeros(moe_layers, model.config.n_routed_experts, dtype=torch.float64, device=ranks.device)
    for batch, counts in ranks.share(list(batches), "validating"):
        inputs = {key: value.to(ranks.device, non_blocking=True) for key, value in batch.items()}
        labels: Tensor = inputs.pop("labels")
        with autocast(dtype, ranks.device):
            out = model(**inputs)
        if not counts:
            continue
        if out.head is not None:  # this is the last stage of a pipeline, or there is none
            nats = token_losses(out.hidden, out.head, labels).double().sum()
            counted = labels >= 0
            sums += torch.stack([nats, counted.sum().double(), sizes[labels.clamp(min=0)][counted].double().sum()])
        if out.counts is not None:
            counts_LE += out.counts
    nats, tokens, size = ranks.sum(sums).tolist()
    measured = {"val_bits_per_byte": nats / math.log(2) / max(size, 1), "val_loss": nats / max(tokens, 1)}
    if moe_layers:
        ranks.sum(counts_LE)
        measured["expert_load"] = (counts_LE / counts_LE.sum(1, keepdim=True)).tolist()
    return measured


def labels_name(sources: Sequence[Source | str | Path], batches: Iterable[Batch], tokenizer: Tokenizer) -> str:
    """`book.csv 5f2c81d09a7be346`: the files and 16 hex digits of the text that the labels of the batches stand for.

    Tokenizer, length and order of the rows do not enter: labels are joined and cut where documents or turns end.
    """
    ids = [label for batch in batches for label in batch["labels"].flatten().tolist() if label != IGNORE]
    parts, begin = [], 0
    for place, token in enumerate([*ids, 0]):
        if token < len(SPECIAL_TOKENS):
            parts.append(tokenizer.decode(ids[begin:place]))
            begin = place + 1
    return _name(sources, parts)


def problems_name(sources: Sequence[Source | str | Path], problems: Iterable[Problem]) -> str:
    """Return the same of problems: of their questions and answers."""
    return _name(sources, (f"{problem.question}\0{problem.answer}" for problem in problems))


def _name(sources: Sequence[Source | str | Path], parts: Iterable[str]) -> str:
    digest = xxhash.xxh3_64()
    for part in sorted(set(parts) - {""}):
        digest.update(characters(part).encode() + b"\0")
    files = [_file_name(source) for source in sources]
    more = [f"and {len(files) - MOST_FILES} more"] if len(files) > MOST_FILES else []
    return f"{', '.join([*files[:MOST_FILES], *more])} {digest.hexdigest()}"


def _file_name(source: Source | str | Path) -> str:
    is_elsewhere = isinstance(source, Source) and (source.name or source.is_hub)
    return str(source) if is_elsewhere else Path(str(source)).name
