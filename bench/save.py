"""What a checkpoint costs the steps beside it: written in the background, and with training waiting for it.

python bench/save.py [--preset 26m] [--dtype fp32] [--rows 4] [--length 512] [--steps 44] [--every 10]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from device import add_device, now

from LMConfig import LMConfig
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from text.tokenizer_training import train_bpe
from training.losses import Batch, NextTokenLoss
from training.machine import DTYPES
from training.parallel.ranks import Ranks
from training.run.checkpoint import Progress
from training.settings import NextTokenSettings
from training.trainer import Trainer
from world.cast import World
from world.corpus import documents


class Noise:
    """Random tokens."""

    def __init__(self, vocab_size: int, length: int) -> None:
        self.vocab_size, self.length = vocab_size, length

    def __len__(self) -> int:
        return 1 << 20

    def batch(self, indices: Sequence[int]) -> Batch:
        numbers = torch.Generator().manual_seed(indices[0])
        ids = torch.randint(self.vocab_size, (len(indices), self.length + 1), generator=numbers)
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


@dataclass
class Times:
    """Seconds of steps without a save, and of those beside each save (what it kept them waiting included)."""

    quiet: list[float]
    saves: list[list[float]]
    bytes: int

    def show(self, name: str) -> None:
        """A line about the first save, which makes room for the copy, and one about those after it."""
        quiet = statistics.median(self.quiet)
        print(f"{name}: {self.bytes / 1e6:,.0f} MB; a step without a save takes {quiet:.2f} s")
        for which, saves in (("the first save", self.saves[:1]), ("later ones", self.saves[1:])):
            if beside := [seconds for steps in saves for seconds in steps]:
                mean = statistics.mean(beside)
                print(
                    f"  a step beside {which}: {mean:.2f} s on average of {len(beside)}, {mean / quiet:.2f}x; "
                    f"at most {max(beside):.2f} s; a save costs {(mean - quiet) * len(beside) / len(saves):.2f} s"
                )


class Watched(Trainer):
    """A trainer that notes when each step begins, and whether a checkpoint was on its way since the one before."""

    def watch(self) -> None:
        self.begins: list[float] = []
        self.beside: list[bool] = []
        self.saving, save = False, self.checkpoints.save

        def noted(name: str, progress: Progress) -> None:
            save(name, progress)
            self.saving = True

        self.checkpoints.save = noted

    def _step(self):
        self.begins.append(now(self.ranks.device))
        self.beside.append(self.saving)
        self.saving = self.checkpoints.saver.busy
        return super()._step()


def measure(options: argparse.Namespace, tokenizer: Tokenizer, background: bool) -> Times:
    """One run of `options.steps` steps with a checkpoint every `options.every`."""
    torch.manual_seed(0)
    config = LMConfig.preset(options.preset, vocab_size=6400)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        settings = NextTokenSettings(
            out=folder, sequence_length=options.length, batch_tokens=options.rows * options.length,
            micro_tokens=options.rows * options.length, max_steps=options.steps, save_every=options.every,
            log_every=1000, dtype=options.dtype, background_save=background, keep=1,
        )  # fmt: skip
        data, loss = Noise(config.vocab_size, options.length), NextTokenLoss(mtp=bool(config.num_nextn_predict_layers))
        trainer = Watched(settings, Ranks.start(options.device), MiniDeepSeek(config), tokenizer, data, loss)
        trainer.watch()
        trainer.run()
        size = sum(path.stat().st_size for path in (Path(folder) / "final").rglob("*") if path.is_file())
    seconds = [after - before for before, after in zip(trainer.begins, trainer.begins[1:], strict=False)]
    # A step's interval ends with the call that saves, so what comes after it tells whether a save was in it.
    beside = [now or later for now, later in zip(trainer.beside, trainer.beside[1:], strict=False)]
    pairs = list(zip(beside, seconds, strict=True))[2:]  # the first steps pay for what is made once
    groups = [(save, [seconds for _, seconds in group]) for save, group in groupby(pairs, key=lambda pair: pair[0])]
    quiet = [seconds for save, group in groups if not save for seconds in group]
    return Times(quiet, [group for save, group in groups if save], size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="26m")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=44)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--dir", help="on whose disk to write; the system's temporary folder when left out")
    add_device(parser)
    options = parser.parse_args()
    tokenizer = train_bpe(list(documents(World.build(1), "pretrain", 200_000)), 600)
    for name, background in (("written in the background", True), ("training waits", False)):
        measure(options, tokenizer, background).show(name)


if __name__ == "__main__":
    main()
