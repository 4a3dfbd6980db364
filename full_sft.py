"""Fine-tune all weights on conversations: loss on the assistant's words and the token that ends its turn.

python full_sft.py --ckpt out/pretrain/final --data chats.jsonl --out out/sft
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dataset import ChatDataset
from errors import command_line
from training.losses import NextTokenLoss
from training.optim import OptimSettings
from training.settings import NextTokenSettings, parse
from training.stage import begin, open_checkpoint
from training.trainer import Trainer
from training.validation import BitsPerByte, held_out_batches


@dataclass(kw_only=True)
class SFTSettings(NextTokenSettings):
    """Settings of supervised fine-tuning.

    Args:
        ckpt: checkpoint folder to start from.
        data: files of conversations (Alpaca, ShareGPT or messages; JSON or JSONL), separated by commas.
        packing: fill each row with several conversations that do not see each other.
        val_fraction: share of the conversations held out.
    """

    ckpt: str
    data: str
    packing: bool = True
    val_fraction: float = 0.01
    epochs: float = 2.0
    batch_tokens: int = 16384
    balance_weight: float | dict[str, float] = 1e-4
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=5e-4, weight_decay=0.0, decay_from=0.0))


def main() -> None:
    settings = parse(SFTSettings, __doc__ or "")
    ranks = begin(settings)
    model, tokenizer = open_checkpoint(settings.ckpt)
    paths = [path for path in settings.data.split(",") if path]
    options = dict(
        on_error=settings.on_error, packing=settings.packing, val_fraction=settings.val_fraction, progress=ranks.main
    )
    dataset = ChatDataset(paths, tokenizer, settings.sequence_length, settings.seed, **options)
    if ranks.main:
        dataset.print_summary()
    validation = None
    if dataset.validation:
        batches = held_out_batches(dataset.validation, settings.val_tokens, settings.micro_tokens)
        validation = BitsPerByte(batches, tokenizer.token_bytes)
    Trainer(settings, ranks, model, tokenizer, dataset, NextTokenLoss(mtp=bool(model.mtp)), validation).run()
    ranks.stop()


if __name__ == "__main__":
    command_line(main)
