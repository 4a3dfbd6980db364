"""Learn which of two answers is preferred: DPO (Rafailov et al. 2023), conservative DPO, IPO or SimPO.

python dpo_train.py --ckpt out/sft/final --data pairs.jsonl --out out/dpo
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from cli import parse
from dataset import PreferenceDataset
from errors import UserError, command_line
from model import MiniDeepSeek
from text.chats.packed_dataset import CUT
from text.order import PAIR_TOKENS
from text.sources.registry import find_sources
from text.tokenizer import Tokenizer
from training.alignment.preference import Ask, HeldOutPairs, PreferenceLoss, PreferenceSettings, text_batches
from training.alignment.reference import ReferenceSettings, ask_once, frozen_reference
from training.distill.teacher import identity
from training.machine import choose_dtype
from training.optim.build import OptimSettings
from training.parallel.dist_settings import CutSettings
from training.parallel.ranks import Ranks
from training.run.progress import saved_run
from training.run.resume import check_unused
from training.startup import begin, open_checkpoint
from training.trainer import Trainer
from training.validation import held_out_batches, labels_name


@dataclass(kw_only=True)
class DPOSettings(ReferenceSettings):
    """Settings of preference learning.

    Args:
        data: pairs (prompt, chosen, rejected): names in --datasets, files, folders or Hub ids, separated by commas;
            NAME=WEIGHT sets a source's share of the mixture.
        sequence_length: most tokens of a conversation; a row holds two of them, or several short ones. What is longer
            loses the oldest turns of its prompt.
        preference: the loss over the pairs.
        precompute_reference: ask the reference once, before training, and hold no second model in memory.
        val_fraction: share of the prompts held out.
        val_text: UTF-8 text to measure bits per byte on, to see whether the model forgets.
    """

    data: str
    preference: PreferenceSettings = field(default_factory=PreferenceSettings)
    precompute_reference: bool = True
    val_fraction: float = 0.05
    val_text: str = ""
    dist: CutSettings = field(default_factory=CutSettings)
    sequence_length: int = PAIR_TOKENS
    batch_tokens: int | dict[str, int] = 8192
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(lr=5e-5, weight_decay=0.0, warmup=0.1, decay_from=0.1)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference and not self.preference.needs_reference:
            raise UserError(f"--reference {self.reference}: {self.preference.loss} has none; leave it out")

    @property
    def row_tokens(self) -> int:
        return 2 * self.sequence_length


def main() -> None:
    settings = parse(DPOSettings, __doc__ or "")
    ranks = begin(settings)
    # Refuses a folder in use before minutes are spent.
    ranks.on_main(lambda: check_unused(Path(settings.out), settings.resume))
    model, tokenizer = open_checkpoint(settings.ckpt, cut=settings.dist.cuts(ranks.world))
    cut = settle_length(settings, ranks, model.config.max_position_embeddings)
    # The MTP layers have no part in this loss. Router biases stand still: policy and reference route by the same ones.
    model.mtp.requires_grad_(False)
    sources = find_sources(settings.data, settings.datasets, "preference")
    shape = settings.sequence_length, settings.seed, settings.on_error, settings.val_fraction, cut
    dataset = PreferenceDataset(sources, tokenizer, *shape, progress=ranks.main)
    if ranks.main:
        dataset.print_summary()
    loss = PreferenceLoss(settings.preference, open_reference(settings, ranks, model, tokenizer, dataset))
    held_out = dataset.validation
    pairs = held_out_batches(held_out, settings.val_tokens, settings.micro_tokens) if held_out else []
    names, text = ({"pairs": labels_name(sources, pairs, tokenizer)} if pairs else {}), []
    if settings.val_text:
        limits = settings.sequence_length, settings.val_tokens, settings.micro_tokens
        text = text_batches(Path(settings.val_text), tokenizer, *limits)
        names["text"] = labels_name([settings.val_text], text, tokenizer)
    validation = HeldOutPairs(loss, pairs, text, tokenizer.token_bytes, names) if pairs or text else None
    Trainer(settings, ranks, model, tokenizer, dataset, loss, validation).run()
    ranks.stop()


def settle_length(settings: DPOSettings, ranks: Ranks, longest: int) -> bool:
    """Lower a length that nobody chose for this run to what the model reads, or give a resumed run its own.

    Returns whether pairs that are too long are cut: those of a run that began without that are not.
    """
    saved = ranks.on_main(lambda: saved_run(Path(settings.out), settings.resume))
    if not settings.holds("sequence_length"):
        length = saved.get("sequence_length")
        is_saved = type(length) is int and length > 0
        settings.sequence_length = length if is_saved else min(settings.sequence_length, longest)
    return not saved or str(saved.get("data")).endswith(CUT)


def open_reference(
    settings: DPOSettings, ranks: Ranks, model: MiniDeepSeek, tokenizer: Tokenizer, dataset: PreferenceDataset
) -> Ask | None:
    """Return what asks the frozen model at each step; None when the data set knows its answers or nobody needs them."""
    if not settings.preference.needs_reference:
        return None

    def asks() -> Ask:  # before the first step the model in training is its own reference
        return frozen_reference(settings, ranks, model, tokenizer, settings.precompute_reference)

    if not settings.precompute_reference:
        return asks()
    dtype = choose_dtype(settings.dtype, ranks.device)
    fingerprint = json.dumps((dataset.pairs.fingerprint, identity(settings.reference or settings.ckpt), str(dtype)))
    path, resume = Path(settings.out) / "reference.safetensors", bool(settings.resume)
    ask_once(asks, dataset, path, fingerprint, resume, settings.micro_rows, dtype, ranks)
    return None


if __name__ == "__main__":
    command_line(main)
