"""A step without a finite loss or gradient changes nothing, is counted and written down, and too many end the run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from forked import on_ranks
from toy_stage import ROWS, TIME, Rows, biases

from errors import UserError, command_line
from training.losses import Batch, Metric, NextTokenLoss
from training.optim.build import state_tensors
from training.parallel.ranks import Ranks
from training.run.log import read_metrics
from training.run.progress import read_progress


class Poison:
    """Rows, and a loss over them that is not finite wherever a batch has one of the samples `bad`.

    Only the gradient is not, if `in_gradient`.
    """

    def __init__(self, *bad: int, in_gradient: bool = False) -> None:
        self.bad, self.in_gradient, self.now = set(bad), in_gradient, False
        self.rows = Rows(self._before)
        self.plain = NextTokenLoss()

    def _before(self, indices: Sequence[int]) -> None:
        self.now = bool(self.bad & set(indices))

    def __call__(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Metric]]:
        loss, count, metrics = self.plain(model, batch)
        if self.now:
            # The slope of the root is infinite at 0.
            loss = loss + (loss - loss.detach()).abs().sqrt() if self.in_gradient else loss * math.inf
        return loss, count, metrics


def poisoned(make, poison: Poison, out: str = "run", **options: object):
    trainer = make(out, poison.rows, **options)
    trainer.loss = poison
    return trainer


def everything(trainer) -> dict[str, torch.Tensor]:
    """Weights, router biases and optimiser state."""
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return state | {name: value.clone() for name, value in state_tensors(trainer.optimizer, trainer.model).items()}


@pytest.mark.parametrize("in_gradient", [False, True], ids=["loss", "gradient"])
def test_weights_moments_and_biases_are_untouched_by_a_skipped_step(in_gradient, make):
    """The third step is poisoned: after three steps all is as it was after two."""
    poison = Poison(2 * ROWS + 1, in_gradient=in_gradient)
    trainer = poisoned(make, poison, max_steps=3)
    seen = []
    poison.rows.before = lambda indices: (seen.append(everything(trainer)), poison._before(indices))
    trainer.run()
    before, after = seen[2], everything(trainer)
    assert before.keys() == after.keys() and any(name.endswith("|exp_avg") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(seen[1]["lm_head.weight"], seen[2]["lm_head.weight"])


def test_training_goes_on_as_if_the_step_had_not_been(make):
    """Poisoned or not, the step takes its turn in the order of the data and in the schedule."""
    trainer = poisoned(make, Poison(ROWS), max_steps=4)
    assert trainer.run() == trainer.out / "final"
    entries = read_metrics(trainer.out / "metrics.jsonl")
    assert [entry.get("skipped") for entry in entries[1:]] == [0, 1, 1, 1]
    assert entries[2]["total_loss"] is None and entries[2]["step"] == 2 and entries[3]["total_loss"] > 0
    assert "Infinity" not in (trainer.out / "metrics.jsonl").read_text()
    assert biases(trainer.model).isfinite().all()
    assert read_progress(trainer.out / "final").skipped == 1


@pytest.mark.parametrize(("in_gradient", "named"), [(False, range(4, 6)), (True, range(ROWS))])
def test_the_samples_of_the_bad_micro_batch_are_written_down(in_gradient, named, make, capsys):
    """Those of the whole step, where the gradient alone overflows."""
    poison = Poison(ROWS + 5, in_gradient=in_gradient)
    trainer = poisoned(make, poison, max_steps=3, micro_tokens=2 * TIME)
    trainer.run()
    (entry,) = [json.loads(line) for line in (trainer.out / "skipped.jsonl").read_text().splitlines()]
    assert entry["step"] == 2 and entry["grad_norm" if in_gradient else "loss"] in ("nan", "inf")
    assert entry["samples"] == [f"sample {ROWS + row}" for row in named]
    assert "skipped: loss " in capsys.readouterr().out


def test_too_many_in_a_row_end_the_run_with_what_is_known(make):
    trainer = poisoned(make, Poison(2 * ROWS, 3 * ROWS), max_steps=6, max_skipped=2, save_every=2)
    with pytest.raises(UserError) as caught:
        trainer.run()
    message = str(caught.value)
    assert "2 steps in a row had no finite loss or gradient (loss inf" in message and f"sample {3 * ROWS}" in message
    assert "lower --optim.lr and use --resume" in message and "\n" not in message
    assert [path.name for path in trainer.out.glob("step-*")] == ["step-2"]


def test_skipped_steps_apart_from_each_other_do_not_end_the_run(make):
    trainer = poisoned(make, Poison(0, 2 * ROWS, 4 * ROWS), max_steps=6, max_skipped=2)
    assert trainer.run().name == "final"
    assert read_progress(trainer.out / "final").skipped == 3


def test_a_batch_that_is_bad_on_one_rank_is_skipped_by_both(make, tmp_path):
    """Rank 1 has the later half of each step's samples."""

    def train(rank: int) -> None:
        ranks = Ranks.start("cpu", timeout=20)
        trainer = poisoned(make, Poison(ROWS + ROWS // 2), ranks=ranks, max_steps=3, save_every=1, keep=3)
        command_line(trainer.run)

    ranks = on_ranks(2, train, tmp_path)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output() + ranks[1].output()
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [entry.get("skipped") for entry in entries[1:]] == [0, 1, 1]
    (entry,) = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert entry["samples"] == [f"sample {ROWS + ROWS // 2 + row}" for row in range(ROWS // 2)]
    weights = [(Path(tmp_path) / "run" / f"step-{step}" / "model.safetensors").read_bytes() for step in (1, 2)]
    assert weights[0] == weights[1]
