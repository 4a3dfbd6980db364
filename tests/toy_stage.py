"""What the tests of the loop share: rows out of nothing, and a trainer of a fresh model over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name

import torch

from LMConfig import LMConfig
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.losses import Batch, NextTokenLoss
from training.parallel.ranks import Ranks
from training.run.log import read_metrics
from training.settings import NextTokenSettings
from training.trainer import Trainer
from training.validation import BitsPerByte

VOCAB, TIME, ROWS = 600, 16, 8


class Rows:
    """Sample i is drawn by the seed i. `before` is called with the numbers of every batch."""

    sequence_length = TIME

    def __init__(self, before: Callable[[Sequence[int]], None] = lambda _: None) -> None:
        self.before = before

    def __len__(self) -> int:
        return 40

    def batch(self, indices: Sequence[int]) -> Batch:
        self.before(indices)
        rows = [torch.randint(VOCAB, (TIME + 1,), generator=torch.Generator().manual_seed(i)) for i in indices]
        ids = torch.stack(rows) % 50 + 100
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


class Maker:
    """`make(out, dataset, world, model fields, **settings)`: a trainer of a fresh model, validated on 4 rows.

    It is rank 0 of `world`, or the one that `ranks` says. by_hand: names of settings that were on the command line; all
    of them if it is left out.
    """

    def __init__(self, folder: Path, tiny_config: Callable[..., LMConfig], tokenizer: Tokenizer) -> None:
        self.folder, self.tiny_config, self.tokenizer = folder, tiny_config, tokenizer

    def __call__(
        self,
        out: str = "run",
        dataset: Rows | None = None,
        world: int = 1,
        model: dict | None = None,
        ranks: Ranks | None = None,
        **changes: object,
    ) -> Trainer:
        given = dict(
            batch_tokens=ROWS * TIME, micro_tokens=ROWS * TIME, sequence_length=TIME, log_every=1, save_every=0,
            dtype="fp32", bias_speed=0.01, max_steps=4,
        )  # fmt: skip
        by_hand = changes.pop("by_hand", None)
        settings = NextTokenSettings(out=str(self.folder / out), **{**given, **changes})
        settings.by_hand = by_hand
        torch.manual_seed(settings.seed)
        config = self.tiny_config(vocab_size=VOCAB, **(model or {}))
        ranks = ranks or Ranks(0, world, torch.device("cpu"))
        validation = BitsPerByte([Rows().batch(range(100, 104))], self.tokenizer.token_bytes)
        loss = NextTokenLoss(mtp=bool(config.num_nextn_predict_layers), mtp_steps=settings.mtp_steps)
        make = (
            resolve_name("training.parallel.initial:Deferred.drawn")
            if settings.dist.cuts(ranks.world)
            else MiniDeepSeek
        )
        return Trainer(settings, ranks, make(config), self.tokenizer, dataset or Rows(), loss, validation)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint but the clock's, and the checksums, of which one is the clock's."""
    clocks = ("progress.json", "manifest.json")
    found = [path for path in folder.rglob("*") if path.is_file() and path.name not in clocks]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def biases(model: MiniDeepSeek) -> torch.Tensor:
    return torch.stack([router.e_score_correction_bias.clone() for router in model.routers()])


def steps_logged(trainer: Trainer) -> list[int]:
    return [entry["step"] for entry in read_metrics(trainer.out / "metrics.jsonl")]


def interrupt_at(step: int, *numbers: int) -> Rows:
    """Rows in which the signals `numbers` arrive while step `step` computes."""

    def before(indices: Sequence[int]) -> None:
        if indices[0] == (step - 1) * ROWS:
            for number in numbers:
                os.kill(os.getpid(), number)

    return Rows(before)
