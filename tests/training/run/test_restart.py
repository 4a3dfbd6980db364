"""`torchrun --max-restarts` resumes a run by itself."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import call_main
from forked import Forked, on_ranks
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from victim import differences

import pretrain
from training.trainer import Trainer

OPTIONS = ["--max_steps", 4, "--save_every", 2, "--micro_tokens", 512, "--dist.timeout", 30]


def torchrun(arguments: list[object], logs: Path) -> None:
    """What `torchrun --standalone --nproc_per_node 2 --max-restarts 1 pretrain.py` does, with workers that are forked.

    In the first attempt the second rank kills itself once step 2 is saved.
    """
    step = Trainer.advance

    def fatal(trainer: Trainer) -> object:
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and trainer.ranks.rank == 1 and trainer.progress.step == 3:
            while not (trainer.out / "step-2").is_dir():  # saved by a thread of the other rank
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer)

    def work() -> None:
        torch.set_num_threads(1)
        Trainer.advance = fatal
        if code := call_main(pretrain.main, *arguments):
            sys.exit(code)

    place = dict(run_id="one", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    specs = DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL)
    elastic_launch(LaunchConfig(1, 1, 2, max_restarts=1, start_method="fork", logs_specs=specs, **place), work)()


def test_a_rank_that_is_killed_costs_the_steps_since_the_last_save_and_nothing_else(
    pretrain_arguments, pretrained, tmp_path, monkeypatch
):
    """Without --resume: the restart knows that it resumes what the same torchrun began."""
    given = [*pretrain_arguments, *OPTIONS, "--out"]
    whole = on_ranks(2, lambda rank: call_main(pretrain.main, *given, tmp_path / "whole"), tmp_path)
    assert [rank.code for rank in whole] == [0, 0], whole[0].output()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    killed = Forked(lambda: torchrun([*given, tmp_path / "killed"], tmp_path / "logs"), tmp_path / "torchrun.log")
    said = lambda: "".join(file.read_text() for file in sorted((tmp_path / "logs").rglob("std*.log")))  # noqa: E731
    assert killed.wait(100) == 0, killed.output() + said()
    assert said().count("resuming from ") == 1 and "step-2: step 2" in said()
    assert not differences(tmp_path / "killed", tmp_path / "whole")
