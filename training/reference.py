"""The reference of a KL term: a frozen model."""

from __future__ import annotations

import copy
from dataclasses import asdict

from errors import UserError
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.stage import open_checkpoint


def frozen_reference(model: MiniDeepSeek, tokenizer: Tokenizer, folder: str) -> MiniDeepSeek:
    """The model of `folder`, or a copy of `model` where none is named; its weights and router biases never move.

    Raises `UserError` unless it reads the same tokens and has the same shape as the model in training.
    """
    if not folder:
        reference = copy.deepcopy(model)
    else:
        reference, theirs = open_checkpoint(folder)
        if theirs.fingerprint != tokenizer.fingerprint:
            raise UserError(f"--reference {folder}: has another tokenizer than --ckpt; both must read the same tokens")
        wanted = asdict(model.config)
        for name, value in asdict(reference.config).items():
            if value != wanted[name]:
                raise UserError(
                    f"--reference {folder}: its {name} is {value}, that of --ckpt {wanted[name]}; "
                    "name a checkpoint of the same shape, or leave it out"
                )
    return reference.requires_grad_(False).eval()
