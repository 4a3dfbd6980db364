"""`torchrun --max-restarts` takes a run up again by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import call_main
from forked import on_ranks
from victim import differences

import pretrain

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = ["--max_steps", "6", "--save_every", "2", "--micro_tokens", "512", "--dist.timeout", "30"]


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max-restarts", "1", "tests/self_killing.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_a_rank_that_is_killed_costs_the_steps_since_the_last_save_and_nothing_else(
    pretrain_arguments, pretrained, tmp_path
):
    """Without --resume: the restart knows that it goes on with what the same torchrun began."""
    whole = on_ranks(
        2, lambda rank: call_main(pretrain.main, *pretrain_arguments, *OPTIONS, "--out", tmp_path / "whole"), tmp_path
    )
    assert [rank.code for rank in whole] == [0, 0], whole[0].output()
    done = torchrun([*pretrain_arguments, *OPTIONS, "--out", str(tmp_path / "killed")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("resuming from ") == 1 and "step-2: step 2" in done.stdout
    assert not differences(tmp_path / "killed", tmp_path / "whole")
