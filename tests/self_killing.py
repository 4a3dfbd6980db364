"""pretrain.py whose last rank kills itself once step 2 is saved, in torchrun's first attempt. For test_restart.py."""

from __future__ import annotations

import os
import signal
import time

import pretrain
from errors import command_line
from training.trainer import Trainer


def main() -> None:
    step = Trainer._step

    def fatal(trainer: Trainer) -> object:
        last, first_attempt = (
            trainer.ranks.rank == trainer.ranks.world - 1,
            os.environ["TORCHELASTIC_RESTART_COUNT"] == "0",
        )
        if last and first_attempt and trainer.progress.step == 3:
            while not (trainer.out / "step-2").is_dir():  # saved by a thread of the other rank
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer)

    Trainer._step = fatal
    pretrain.main()


if __name__ == "__main__":
    command_line(main)
