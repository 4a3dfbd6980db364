"""The reference policy: a frozen model, or its log-probabilities of every token, computed once."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from dataset import PreferenceDataset
from errors import UserError, tracked
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.alignment.preference import answer_log_probs
from training.fingerprinted import open_arrays, save_arrays
from training.machine import autocast
from training.parallel.ranks import Ranks
from training.startup import open_checkpoint


def frozen_reference(model: MiniDeepSeek, tokenizer: Tokenizer, folder: str) -> MiniDeepSeek:
    """Return the model of `folder`, or a copy of `model` where none is named; its weights and biases never move.

    Raises `UserError` unless it reads the same tokens and has the same shape as the model in training.
    """
    if not folder:
        reference = copy.deepcopy(model)
    else:
        reference, theirs = open_checkpoint(folder)
        if theirs.fingerprint != tokenizer.fingerprint:
            raise UserError(f"--reference {folder}: has another tokenizer than --ckpt; both must read the same tokens")
        ours = asdict(model.config)
        for name, value in asdict(reference.config).items():
            if value != ours[name]:
                raise UserError(
                    f"--reference {folder}: its {name} is {value}, that of --ckpt {ours[name]}; "
                    "name a checkpoint of the same shape, or leave it out"
                )
    return reference.requires_grad_(False).eval()


def ask_once(
    reference: MiniDeepSeek, dataset: PreferenceDataset, path: Path, fingerprint: str, resume: bool, micro_rows: int,
    dtype: torch.dtype, ranks: Ranks,
) -> None:  # fmt: skip
    """Let the data set know what the reference says, kept in `path`: a resumed run has the very same numbers.

    fingerprint: of pairs and reference; a file of another is not used.
    """
    # The main rank's: where each looked for itself, one might find the file that another does not.
    log_probs = ranks.on_main(lambda: load_log_probs(path, fingerprint) if resume else None)
    if log_probs is None:
        log_probs = reference_log_probs(reference, dataset, micro_rows, dtype, ranks)
        if ranks.main:
            save_arrays(path, {"log_probs": log_probs}, fingerprint)
    dataset.know_reference(log_probs)


def load_log_probs(path: Path, fingerprint: str) -> np.ndarray | None:
    """Return what was kept under this fingerprint; None where nothing fits."""
    opened = open_arrays(path, fingerprint)
    return None if opened is None else opened.get_tensor("log_probs")


@torch.no_grad()
def reference_log_probs(
    reference: MiniDeepSeek, dataset: PreferenceDataset, micro_rows: int, dtype: torch.dtype, ranks: Ranks
) -> np.ndarray:
    """log p of every compared token of all pairs, the held-out ones too: (tokens,) float32 of `dataset.pairs.ids`.

    The ranks share the work, and each gets all of it.
    """
    ranks.say(f"asking the reference about {len(dataset.pairs)} pairs, once")
    reference.to(ranks.device)
    log_probs = torch.zeros(len(dataset.pairs.ids), dtype=torch.float32)
    work = [(part, start) for part in dataset.everything() for start in range(0, len(part), micro_rows)]
    work = work[ranks.rank :: ranks.world]
    for part, start in tracked(work, "asking the reference, batches", len(work), ranks.main):
        rows = range(start, min(start + micro_rows, len(part)))
        batch = {name: value.to(ranks.device) for name, value in part.batch(rows).items()}
        with autocast(dtype, ranks.device):
            values = answer_log_probs(reference, batch).cpu()
        for row, index in enumerate(rows):
            places = torch.from_numpy(part.places(index))
            log_probs[places] = values[row, : len(places)]
    return ranks.sum(log_probs.to(ranks.device)).cpu().numpy()
