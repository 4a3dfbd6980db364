"""What the stages that learn from conversations share: their settings and how they open the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from text.chats.chat_template import encode_chats
from text.chats.packed_dataset import ChatDataset
from text.sources.registry import find_sources
from text.tokenizer import Tokenizer
from training.losses import IGNORE, Batch
from training.optim.build import OptimSettings
from training.parallel.ranks import Ranks
from training.run.samples import LONGEST, Samples, first_different, open_samples
from training.settings import SampleSettings
from training.validation import BitsPerByte, held_out_batches, labels_name


@dataclass(kw_only=True)
class ChatSettings(SampleSettings):
    """Settings of a stage that learns from conversations.

    Args:
        ckpt: checkpoint folder to start from.
        data: conversations: names in --datasets, files, folders or Hub ids, separated by commas; NAME=WEIGHT sets a
            source's share of the mixture.
        packing: fill each row with several conversations that do not see each other.
        val_fraction: share of the conversations held out.
    """

    ckpt: str
    data: str
    packing: bool = True
    val_fraction: float = 0.01
    batch_tokens: int | dict[str, int] = 16384
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=5e-4, weight_decay=0.0, decay_from=0.0))

    DEFAULT_EPOCHS: ClassVar[float] = 2.0


def chat_samples(settings: ChatSettings, tokenizer: Tokenizer, ranks: Ranks, dataset: ChatDataset) -> Samples | None:
    """Answers to held-out questions, or to those of --sample_prompts, while the model is trained."""
    rows, validated = dataset.validation or dataset, dataset.validation is not None
    return open_samples(settings, tokenizer, ranks, rows, validated, chat_prompts)


def chat_prompts(tokenizer: Tokenizer, lines: list[str], rows: Iterable[Batch]) -> list[list[int]]:
    """Return questions up to where the answer begins: the lines, or the first of each row."""
    if not lines:
        return first_different(map(_question, rows))
    questions = [[{"role": "user", "content": line}] for line in lines]
    return [ids for ids, _ in encode_chats(tokenizer, questions, add_generation_prompt=True)]


def _question(batch: Batch) -> list[int]:
    """Return the first conversation of a row up to its first answer; nothing where that is too long."""
    answered = (batch["labels"][0] != IGNORE).nonzero()
    question = batch["input_ids"][0, : int(answered[0]) + 1].tolist() if len(answered) else []
    return question if len(question) <= LONGEST else []


def open_chats(settings: ChatSettings, tokenizer: Tokenizer, ranks: Ranks) -> tuple[ChatDataset, BitsPerByte | None]:
    """Return the conversations to train on, reported once, and what measures the held-out ones (None without)."""
    sources = find_sources(settings.data, settings.datasets, "chat")
    options = dict(
        on_error=settings.on_error, packing=settings.packing, val_fraction=settings.val_fraction, progress=ranks.main
    )
    dataset = ChatDataset(sources, tokenizer, settings.sequence_length, settings.seed, **options)
    if ranks.main:
        dataset.print_summary()
    if not dataset.validation:
        return dataset, None
    batches = held_out_batches(dataset.validation, settings.val_tokens, settings.micro_tokens)
    return dataset, BitsPerByte(batches, tokenizer.token_bytes, {"text": labels_name(sources, batches, tokenizer)})
