"""Fine-tune a low-rank adapter on conversations (LoRA, Hu et al. 2021); the model itself stays as it is.

python lora_sft.py --ckpt out/sft/final --data messages.jsonl --out out/lora --merge
python eval/chat.py --ckpt out/sft/final --lora out/lora/final        or, merged:  --ckpt out/lora/merged
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import nn

from cli import parse
from errors import UserError, command_line, waiting
from training.adapters.frozen import check_base, shrink_frozen
from training.adapters.lora import LoraSettings
from training.chats import ChatSettings, chat_samples, open_chats
from training.losses import NextTokenLoss
from training.machine import choose_dtype
from training.optim.build import OptimSettings
from training.parallel.dist_settings import ShardSettings
from training.run.progress import BEST, read_progress
from training.run.saver import first_and_best
from training.startup import begin, open_checkpoint
from training.trainer import Trainer


@dataclass(kw_only=True)
class LoraSFTSettings(ChatSettings):
    """Settings of fine-tuning an adapter.

    Args:
        lora: what is adapted, and how.
        base: how the frozen weights are kept: auto (in the type of the products), int8 or nf4 (QLoRA).
        merge: also write the model with the adapter in its weights, to OUT/merged: the best one with --keep_best.
    """

    lora: LoraSettings = field(default_factory=LoraSettings)
    base: str = "auto"
    merge: bool = False
    dist: ShardSettings = field(default_factory=ShardSettings)
    COMPILES: ClassVar[bool] = False
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=2e-3, weight_decay=0.0, decay_from=0.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_base(self.base)
        if self.lora.dora and self.base != "auto":
            raise UserError(f"--base {self.base}: DoRA reads the weights themselves; leave it or --lora.dora out")
        if self.dist.ep > 1 and (self.lora.adapts_experts or self.base != "auto"):
            what = f"--lora.targets {self.lora.targets}" if self.lora.adapts_experts else f"--base {self.base}"
            raise UserError(f"--dist.ep {self.dist.ep}: does not go with {what}; give --dist.zero 3")


def main() -> None:
    settings = parse(LoraSFTSettings, __doc__ or "")
    with waiting("importing peft"):  # for seconds, which --help need not wait for
        from training.adapters.adapter import Adapter, save_merged

    ranks = begin(settings)
    model, tokenizer = open_checkpoint(settings.ckpt, cut=settings.dist.cuts(ranks.world))
    # The MTP layers predict from states that the adapter changes, and have no adapter: they take no part.
    model.mtp = nn.ModuleList()
    adapter = Adapter.add(model, settings.lora, settings.ckpt)
    shrink_frozen(model, settings.base, choose_dtype(settings.dtype, ranks.device))
    dataset, validation = open_chats(settings, tokenizer, ranks)
    ranks.say(f"adapter    {adapter.parameters:,} parameters train: {settings.lora.targets}, r {settings.lora.r}")
    # Router biases stand still: an adapter has no place for them.
    loss = NextTokenLoss(mtp=False, balance_weight=0.0)
    ratios = {"lora_B": settings.lora.plus_ratio}
    samples = chat_samples(settings, tokenizer, ranks, dataset)
    # No name for the trainer: what DistributedDataParallel holds must go before the ranks' group does, or that waits.
    reached = Trainer(settings, ranks, model, tokenizer, dataset, loss, validation, adapter, ratios, samples).run()
    if settings.merge and ranks.main and reached.name == "final":
        best = Path(settings.out) / BEST
        chosen = best if settings.keep_best and best.is_dir() else reached
        save_merged(settings.ckpt, chosen, Path(settings.out) / "merged")
        if chosen == best and first_and_best(Path(settings.out), read_progress(best).best)[0]:
            ranks.say(f"notice: merged all the same; on the held-out rows {settings.ckpt} is no worse without it")
    ranks.stop()


if __name__ == "__main__":
    command_line(main)
