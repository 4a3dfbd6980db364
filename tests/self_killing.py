"""pretrain.py whose last rank kills itself once step 2 is saved, in torchrun's first attempt. For test_restart.py.

As in the other tests the machine is not measured and no curves are drawn.
"""

from __future__ import annotations

import os
import signal
import time

import pretrain
import training.machine
import training.trainer
from errors import command_line
from training.trainer import Trainer


def main() -> None:
    step = Trainer._step

    def fatal(trainer: Trainer) -> object:
        first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if trainer.ranks.rank == trainer.ranks.world - 1 and first_attempt and trainer.progress.step == 3:
            while not (trainer.out / "step-2").is_dir():  # saved by a thread of the other rank
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer)

    Trainer._step = fatal
    training.trainer.draw_run = lambda out: None
    training.machine.measured_peak = lambda *_: 1e15
    pretrain.main()


if __name__ == "__main__":
    command_line(main)
