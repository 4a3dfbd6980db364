"""How every stage begins: seed, ranks, and a model with the tokenizer it was trained with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from errors import UserError
from LMConfig import LMConfig
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.machine import choose_dtype, machine_peak
from training.parallel.ranks import Ranks
from training.run.lock import restarted
from training.run.progress import newest
from training.settings import StageSettings, model_config

DEFERRED = "training.parallel.initial:Deferred"


def begin(settings: StageSettings) -> Ranks:
    """Join the other ranks, set threads and seed: the same weights on every rank. A restart by torchrun resumes.

    The machine's peak is measured here, while its memory is empty and the other ranks wait.
    """
    ranks = Ranks.start(settings.device, settings.dist.timeout)
    if settings.trackers:
        ranks.on_main(lambda: resolve_name("training.run.trackers:check_installed")(settings.trackers))
    if ranks.on_main(lambda: restarted(Path(settings.out))):
        settings.resume = settings.resume or True
    if settings.carry_optimizer and not resumes(settings, ranks):
        ranks.on_main(lambda: resolve_name("training.run.state:check_carried")(settings))
    if settings.threads:
        torch.set_num_threads(settings.threads)
    dtype = choose_dtype(settings.dtype, ranks.device)
    ranks.on_main(lambda: machine_peak(dtype, ranks.device))
    torch.manual_seed(settings.seed)
    return ranks


def resumes(settings: StageSettings, ranks: Ranks) -> bool:
    """Return whether the run resumes from a checkpoint of its own; the same on all ranks."""
    return bool(settings.resume) and ranks.on_main(lambda: newest(Path(settings.out)) is not None)


def open_checkpoint(
    folder: str, choice: dict[str, Any] | None = None, cut: bool = False
) -> tuple[MiniDeepSeek, Tokenizer]:
    """Open the fp32 model of a checkpoint folder and its tokenizer.

    choice: as in `LMConfig.continued`. cut: the weights wait until ranks take their shares.
    """
    if (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"{folder}: is an adapter, not a model; give the checkpoint it was trained on as --ckpt and the adapter "
            "as --lora, or merge them with lora_sft.py --merge"
        )
    read = resolve_name(f"{DEFERRED}.read") if cut else MiniDeepSeek.from_pretrained
    model = read(folder, adapt=lambda config: config.continued(choice or {}, folder))
    tokenizer = Tokenizer.from_folder(folder)
    check_vocabulary(model.config, tokenizer, folder)
    return model, tokenizer


def continue_checkpoint(
    settings: StageSettings, folder: str, choice: dict[str, Any], ranks: Ranks
) -> tuple[MiniDeepSeek, Tokenizer]:
    """`open_checkpoint` for a stage with a `model` setting; what changes of the model is reported in one line.

    A resumed run is compared with its own checkpoint, field by field (`same_shape`). The preset is left out there:
    the config.yaml of older runs names the default one, whatever their checkpoint was.
    """
    if resumes(settings, ranks):
        choice = {name: value for name, value in choice.items() if name != "preset"}
    model, tokenizer = open_checkpoint(folder, choice, settings.dist.cuts(ranks.world))
    now = asdict(model.config)
    before = {name: getattr(LMConfig.from_pretrained(folder), name) for name in now if name in choice}
    changed = [f"{name} = {now[name]} (was {value})" for name, value in before.items() if now[name] != value]
    if changed:
        ranks.say(f"model      {folder} continues with {', '.join(changed)}")
    return model, tokenizer


def new_model(choice: dict[str, Any], folder: str, cut: bool = False) -> tuple[MiniDeepSeek, Tokenizer]:
    """Make random weights for the tokenizer of a folder.

    choice: as in `model_config`. cut: as in `open_checkpoint`.

    Raises `UserError` for a vocabulary that is smaller than the tokenizer's, or for other special tokens.
    """
    tokenizer = Tokenizer.from_folder(folder)
    fixed = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    wrong = [name for name, value in fixed.items() if choice.get(name, value) != value]
    if "vocab_size" in choice and choice["vocab_size"] < tokenizer.vocab_size:
        wrong.append("vocab_size")
    fixed["vocab_size"] = tokenizer.vocab_size
    for name in wrong:
        raise UserError(f"--model.{name} {choice[name]}: it is {fixed[name]} in {folder}; leave it out")
    make = resolve_name(f"{DEFERRED}.drawn") if cut else MiniDeepSeek
    return make(model_config({**fixed, **choice})), tokenizer


def check_vocabulary(config: LMConfig, tokenizer: Tokenizer, place: str | Path) -> None:
    """Raise `UserError` unless this may be the tokenizer that the model was trained with."""
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
