"""Several processes train as one: torchrun on CPU with gloo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pretrain
from errors import UserError
from training.log import read_metrics
from training.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
# A large epsilon keeps AdamW from turning the rounding of tiny gradients into whole steps.
RECIPE = [
    "--micro_tokens",
    "256",
    "--save_every",
    "2",
    "--balance_weight",
    "0.01",
    "--mtp_weight",
    '{"0": 0, "0.3": 0.3}',
    "--optim.eps",
    "1e-3",
    "--max_steps",
    "4",
]
MEASURED = ("loss", "total_loss", "mtp_loss", "balance_loss", "grad_norm", "val_bits_per_byte", "val_loss")


def measured(out: Path) -> dict[str, list[float]]:
    entries = read_metrics(out / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3, 4]
    return {name: [entry[name] for entry in entries if name in entry] for name in MEASURED}


def biases(out: Path) -> dict[str, list[float]]:
    weights = load_file(out / "final" / "model.safetensors")
    return {name: value.tolist() for name, value in weights.items() if name.endswith("e_score_correction_bias")}


def test_two_ranks_train_as_one_process_does(pretrain_arguments, tmp_path, run):
    """16 rows a step: 4 micro-batches on one process, 2 on each of two; rank 1 waits for the shards of rank 0.

    In the first step the MTP layer takes no part.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(pretrain.main, *pretrain_arguments, *RECIPE, "--out", one).code == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "pretrain.py"]
    command += [*pretrain_arguments, *RECIPE, "--out", str(two), "--shards", str(tmp_path / "shards")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "16 rows of 64 tokens = 2 ranks x 2 accumulated x 4 rows" in done.stdout
    assert done.stdout.count("finished: ") == 1  # one process speaks

    alone, together = measured(one), measured(two)
    assert len(alone["mtp_loss"]) == 3
    for name in MEASURED:
        assert together[name] == pytest.approx(alone[name], rel=1e-4), name
    assert biases(two) == biases(one) and len(biases(two)) == 2
    assert [entry.get("max_vio") for entry in read_metrics(two / "metrics.jsonl")] == [
        entry.get("max_vio") for entry in read_metrics(one / "metrics.jsonl")
    ]

    # The second half again, on one process, from what two had saved.
    shutil.rmtree(two / "final")
    assert run(pretrain.main, *pretrain_arguments, *RECIPE, "--out", two, "--resume").code == 0
    again = measured(two)
    for name in MEASURED:
        assert again[name] == pytest.approx(alone[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("device", "what"), [("cuda", "no CUDA device.*use --device cpu"), ("tpu", "one of auto, cpu")]
)
def test_a_device_that_is_not_there_is_named(device, what, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=f"--device {device}: .*{what}"):
        Ranks.start(device)


def test_one_process_needs_no_torchrun(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ranks = Ranks.start("auto")
    assert (ranks.rank, ranks.world, ranks.device.type, ranks.main) == (0, 1, "cpu", True)
    model = torch.nn.Linear(2, 2)
    assert ranks.wrap(model) is model and ranks.sum(torch.ones(2)).tolist() == [1, 1]


def test_an_error_of_ones_own_is_not_blamed_on_a_peer():
    with pytest.raises(RuntimeError, match="out of memory"), Ranks(0, 2, torch.device("cpu")).explained(3.0):
        raise RuntimeError("CUDA out of memory")
