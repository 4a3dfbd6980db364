"""Fine-tune all weights on conversations: loss on the assistant's words and the token that ends its turn.

python full_sft.py --ckpt out/pretrain/final --data chats.jsonl --out out/sft
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cli import parse
from errors import command_line
from training.chats import ChatSettings, chat_samples, open_chats
from training.losses import NextTokenLoss
from training.parallel.dist_settings import ShardSettings
from training.settings import NextTokenSettings
from training.startup import begin, open_checkpoint
from training.trainer import Trainer


@dataclass(kw_only=True)
class SFTSettings(ChatSettings, NextTokenSettings):
    """Settings of supervised fine-tuning."""

    dist: ShardSettings = field(default_factory=ShardSettings)


def main() -> None:
    settings = parse(SFTSettings, __doc__ or "")
    ranks = begin(settings)
    model, tokenizer = open_checkpoint(settings.ckpt, cut=settings.dist.cuts(ranks.world))
    dataset, validation = open_chats(settings, tokenizer, ranks)
    loss = NextTokenLoss(mtp=bool(model.mtp), mtp_steps=settings.mtp_steps)
    samples = chat_samples(settings, tokenizer, ranks, dataset)
    Trainer(settings, ranks, model, tokenizer, dataset, loss, validation, samples=samples).run()
    ranks.stop()


if __name__ == "__main__":
    command_line(main)
