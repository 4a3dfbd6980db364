"""How fast arms train, side by side in one process: a few steps of each by turns, on random tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from time import perf_counter
from typing import Any

import torch

from training.losses import Batch, NextTokenLoss
from training.optim.build import OptimSettings
from training.parallel.ranks import Ranks
from training.settings import NextTokenSettings
from training.startup import new_model
from training.trainer import Trainer

WARM, ROUNDS, STEPS = 3, 9, 6  # steps before the first round; rounds; steps of an arm in each
OPTIONS = {field.name for field in fields(NextTokenSettings)} - {"optim"}


class RandomRows:
    """Rows of random tokens, sample i drawn by the seed i: what they say has no part in how long a step takes."""

    def __init__(self, tokens: int, vocabulary: int) -> None:
        self.sequence_length, self._vocabulary = tokens, vocabulary

    def __len__(self) -> int:
        return 2**20

    def batch(self, indices: Sequence[int]) -> Batch:
        draws, size = [torch.Generator().manual_seed(index) for index in indices], (self.sequence_length + 1,)
        ids = torch.stack([torch.randint(self._vocabulary, size, generator=draw) for draw in draws])
        return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


class TimedTrainer(Trainer):
    """A trainer whose steps are timed and leave nothing behind."""

    @classmethod
    def of(cls, settings: Mapping[str, Any], tokenizer: str, out: str, device: str, threads: int) -> TimedTrainer:
        """settings: of pretrain.py."""
        given = {name: value for name, value in settings.items() if name in OPTIONS}
        given |= {"out": out, "device": device, "threads": threads, "max_tokens": None, "max_steps": 2**20}
        model, tokens = new_model(settings["model"], tokenizer)
        rows = RandomRows(settings["sequence_length"], tokens.vocab_size)
        loss = NextTokenLoss(mtp=bool(model.mtp), mtp_steps=given.get("mtp_steps", 1))
        own = NextTokenSettings(optim=OptimSettings(**settings["optim"]), **given)
        return cls(own, Ranks.start(device), model, tokens, rows, loss)

    def rate(self, steps: int) -> float:
        """Do some more steps. Returns their tokens per second."""
        began, tokens = perf_counter(), 0
        for _ in range(steps):
            result, _ = self.advance()
            tokens += result.tokens  # which are read from the device: it has computed them
        return tokens / (perf_counter() - began)


def training_rates(
    arms: Mapping[str, Mapping[str, Any]], tokenizer: str, device: str, threads: int
) -> dict[str, list[float]]:
    """Return tokens per second of each arm's training in each round. arms: settings of pretrain.py."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with tempfile.TemporaryDirectory() as out:
            trainers = {name: TimedTrainer.of(given, tokenizer, out, device, threads) for name, given in arms.items()}
            for trainer in trainers.values():
                trainer.rate(WARM)
            rounds = [{name: trainer.rate(STEPS) for name, trainer in trainers.items()} for _ in range(ROUNDS)]
    finally:
        torch.set_num_threads(before)
    return {name: [each[name] for each in rounds] for name in arms}
