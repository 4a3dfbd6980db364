"""Learn from a teacher: its distributions over the next token (white box), or its answers to prompts (black box).

python distill.py --ckpt out/small/final --teacher out/sft/final --data chats.jsonl --out out/distilled
"""

from __future__ import annotations

from dataclasses import dataclass

from errors import command_line
from training.chats import ChatSettings, open_chats
from training.distillation import DistillationLoss, DistillationSettings
from training.machine import choose_dtype
from training.settings import parse
from training.stage import begin, open_checkpoint
from training.teacher import open_teacher
from training.trainer import Trainer


@dataclass(kw_only=True)
class DistillSettings(DistillationSettings, ChatSettings):
    """Settings of distillation.

    Args:
        teacher: checkpoint folder, or a causal language model that transformers opens.
    """

    teacher: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()


def main() -> None:
    settings = parse(DistillSettings, __doc__ or "")
    ranks = begin(settings)
    model, tokenizer = open_checkpoint(settings.ckpt)
    dtype = choose_dtype(settings.dtype, ranks.device)
    teacher = open_teacher(settings.teacher, tokenizer, model.config.vocab_size, dtype, ranks.device)
    dataset, validation = open_chats(settings, tokenizer, ranks)
    loss = DistillationLoss(mtp=bool(model.mtp), settings=settings, teacher=teacher)
    Trainer(settings, ranks, model, tokenizer, dataset, loss, validation).run()
    ranks.stop()


if __name__ == "__main__":
    command_line(main)
