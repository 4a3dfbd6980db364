"""How every stage begins: seed, ranks, and a model with the tokenizer it was trained with."""

from __future__ import annotations

from pathlib import Path

import torch

from errors import UserError
from LMConfig import LMConfig
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.checkpoints.lock import restarted
from training.machine import choose_dtype, machine_peak
from training.ranks import Ranks
from training.settings import StageSettings


def begin(settings: StageSettings) -> Ranks:
    """Join the other ranks, set threads and seed: the same weights on every rank. A restart by torchrun resumes.

    The machine's peak is measured here, while its memory is empty and the other ranks wait.
    """
    ranks = Ranks.start(settings.device, settings.dist.timeout)
    if ranks.on_main(lambda: restarted(Path(settings.out))):
        settings.resume = settings.resume or True
    if settings.threads:
        torch.set_num_threads(settings.threads)
    dtype = choose_dtype(settings.dtype, ranks.device)
    ranks.on_main(lambda: machine_peak(dtype, ranks.device))
    torch.manual_seed(settings.seed)
    return ranks


def open_checkpoint(folder: str) -> tuple[MiniDeepSeek, Tokenizer]:
    """The fp32 model of a checkpoint folder and its tokenizer."""
    if (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"{folder}: is an adapter, not a model; give the checkpoint it was trained on as --ckpt and the adapter "
            "as --lora, or merge them with lora_sft.py --merge"
        )
    model = MiniDeepSeek.from_pretrained(folder)
    tokenizer = Tokenizer.from_folder(folder)
    check_vocabulary(model.config, tokenizer, folder)
    return model, tokenizer


def check_vocabulary(config: LMConfig, tokenizer: Tokenizer, place: str | Path) -> None:
    """A model can only be used with the tokenizer it was trained with."""
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"{place}: the model knows {config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}; "
            "use the tokenizer that the checkpoint was trained with"
        )
    for name in ("bos", "eos"):
        ours, theirs = getattr(tokenizer, f"{name}_id"), getattr(config, f"{name}_token_id")
        if ours != theirs:
            raise UserError(
                f"{place}: {name}_token_id is {theirs} in config.json and {ours} in the tokenizer; they must agree"
            )
