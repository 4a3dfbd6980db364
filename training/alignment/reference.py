"""The reference policy: a frozen model, or its log-probabilities of every token, computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dataset import PreferenceDataset
from errors import UserError, tracked
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.alignment.preference import Ask, answer_log_probs, whole
from training.fingerprinted import open_arrays, save_arrays
from training.machine import autocast, choose_dtype
from training.parallel.ranks import Ranks
from training.settings import StageSettings
from training.startup import open_checkpoint

if TYPE_CHECKING:
    from training.parallel.sharding import Sharded


@dataclass(kw_only=True)
class ReferenceSettings(StageSettings):
    """Settings of a stage that compares the model in training with a reference.

    Args:
        ckpt: checkpoint folder to start from; it should already answer questions.
        reference: checkpoint folder of the reference, if it is not `ckpt`.
    """

    ckpt: str
    reference: str = ""


@dataclass(frozen=True)
class ShardedReference:
    """A reference in shards, which all ranks ask together."""

    sharded: Sharded

    def __call__(self, work: Callable[[MiniDeepSeek], Tensor]) -> Tensor:
        return self.sharded.measure(work)

    def close(self) -> None:
        """Give its memory back; FSDP's modules hold one another, so a collection would have to find them first."""
        for _, share in self.sharded.shards.named_parameters():
            share.untyped_storage().resize_(0)


def frozen_reference(
    settings: ReferenceSettings, ranks: Ranks, model: MiniDeepSeek, tokenizer: Tokenizer, as_it_is: bool = False
) -> Ask:
    """Return what asks the model of `settings.reference`, or where none is named `model` as it is before training.

    Its weights and biases never move. Where ranks cut the model they cut it too, and ask it together.

    as_it_is: it is asked before `model` is trained, of which no copy is needed then.

    Raises `UserError` unless it reads the same tokens and has the same shape as the model in training.
    """
    cut, folder, reference = settings.dist.cuts(ranks.world), settings.reference, model
    if folder or cut:
        reference, theirs = open_checkpoint(folder or settings.ckpt, cut=cut)
        if theirs.fingerprint != tokenizer.fingerprint:
            raise UserError(f"--reference {folder}: has another tokenizer than --ckpt; both must read the same tokens")
        ours = asdict(model.config)
        for name, value in asdict(reference.config).items():
            if value != ours[name]:
                raise UserError(
                    f"--reference {folder}: its {name} is {value}, that of --ckpt {ours[name]}; "
                    "name a checkpoint of the same shape, or leave it out"
                )
    elif not as_it_is:
        reference = copy.deepcopy(model)
    if cut:
        dtype = choose_dtype(settings.dtype, ranks.device)
        shard = resolve_name("training.parallel.sharding:shard_frozen")
        return ShardedReference(shard(settings, ranks, reference, dtype))
    reference = reference.to(ranks.device)
    if not as_it_is or folder:
        reference.requires_grad_(False).eval()
    return whole(reference)


def ask_once(
    open_reference: Callable[[], Ask], dataset: PreferenceDataset, path: Path, fingerprint: str, resume: bool,
    micro_rows: int, dtype: torch.dtype, ranks: Ranks,
) -> None:  # fmt: skip
    """Let the data set know what the reference says, kept in `path`: a resumed run has the very same numbers.

    fingerprint: of pairs and reference; a file of another is not used.
    """
    # The main rank's: where each looked for itself, one might find the file that another does not.
    log_probs = ranks.on_main(lambda: load_log_probs(path, fingerprint) if resume else None)
    if log_probs is None:
        reference = open_reference()
        log_probs = reference_log_probs(reference, dataset, micro_rows, dtype, ranks)
        if isinstance(reference, ShardedReference):
            reference.close()
        if ranks.main:
            save_arrays(path, {"log_probs": log_probs}, fingerprint)
    dataset.know_reference(log_probs)


def load_log_probs(path: Path, fingerprint: str) -> np.ndarray | None:
    """Return what was kept under this fingerprint; None where nothing fits."""
    opened = open_arrays(path, fingerprint)
    return None if opened is None else opened.get_tensor("log_probs")


@torch.no_grad()
def reference_log_probs(
    ask: Ask, dataset: PreferenceDataset, micro_rows: int, dtype: torch.dtype, ranks: Ranks
) -> np.ndarray:
    """log p of every compared token of all pairs, the held-out ones too: (tokens,) float32 of `dataset.pairs.ids`.

    The ranks share the work, each as many batches as the others, and get all of it.
    """
    ranks.say(f"asking the reference about {len(dataset.pairs)} pairs, once")
    log_probs = torch.zeros(len(dataset.pairs.ids), dtype=torch.float32)
    work = [(part, start) for part in dataset.everything() for start in range(0, len(part), micro_rows)]
    places = range(ranks.rank, -(-len(work) // ranks.world) * ranks.world, ranks.world)
    for place in tracked(places, "asking the reference, batches", len(places), ranks.main):
        part, start = work[place % len(work)]
        rows = range(start, min(start + micro_rows, len(part)))
        batch = {name: value.to(ranks.device) for name, value in part.batch(rows).items()}
        with autocast(dtype, ranks.device):
            values = ask(lambda model, batch=batch: answer_log_probs(model, batch)).cpu()
        for row, index in enumerate(rows if place < len(work) else ()):  # another rank has the others
            tokens = torch.from_numpy(part.places(index))
            log_probs[tokens] = values[row, : len(tokens)]
    return ranks.sum(log_probs.to(ranks.device)).cpu().numpy()
