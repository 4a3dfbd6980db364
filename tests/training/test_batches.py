"""Batches that a thread makes ahead are those that are made in turn; its errors wait for their turn, and it ends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from toy_stage import ROWS, TIME, Rows, files

import training.batches
from errors import UserError
from training.batches import AHEAD, Batches
from training.losses import Batch
from training.parallel.ranks import Ranks

SETTINGS = SimpleNamespace(rows=ROWS, micro_rows=3)  # micro-batches of 3, 3 and 2 samples
CPU = torch.device("cpu")


@pytest.fixture
def ahead(monkeypatch) -> None:
    """As on a GPU, in the CPU's memory."""
    monkeypatch.setattr(training.batches, "is_made_ahead", lambda device: True)
    monkeypatch.setattr(training.batches, "pinned", lambda x: x)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def batches(rows: Rows, whole_run: bool = True, rank: int = 0, world: int = 1) -> Batches:
    return Batches(SETTINGS, Ranks(rank, world, CPU), rows, lambda *_: None, whole_run)


def test_a_thread_makes_the_same_batches_also_from_the_middle_and_after_a_step_that_was_left(ahead, monkeypatch):
    places = [(4, 0), (4, 1), (4, 2), (5, 0), (5, 1), (4, 2), (5, 0)]
    made = batches(Rows())
    assert threads() == []  # it begins with the first batch
    got = [made.take(*place) for place in places]
    assert len(threads()) == 1
    made.close()
    assert threads() == []
    monkeypatch.setattr(training.batches, "is_made_ahead", lambda device: False)
    plain = batches(Rows())
    for place, batch in zip(places, got, strict=True):
        want = plain.take(*place)
        assert batch.keys() == want.keys() and all(torch.equal(batch[name], want[name]) for name in want)
    assert threads() == []


def test_ranks_share_a_step():
    shares = [batches(Rows(), rank=rank, world=2).samples(3) for rank in range(2)]
    assert shares == [[range(24, 27), range(27, 28)], [range(28, 31), range(31, 32)]]


@pytest.mark.parametrize("whole_run", [True, False])
def test_what_a_policy_makes_is_asked_for_in_its_own_step_only(ahead, whole_run):
    asked: list[int] = []
    made = batches(Rows(lambda indices: asked.append(indices[0])), whole_run)
    for index in range(3):
        made.take(0, index)
        made._thread.submit(int).result()  # all that was asked for before is made
        most = index + AHEAD if whole_run else min(index + AHEAD, 2)
        assert asked == [0, 3, 6, 8, 11][: most + 1]
    made.close()


def test_an_error_comes_up_when_its_batch_is_due(ahead):
    def before(indices: Sequence[int]) -> None:
        if indices[0] == 6:
            raise UserError("sample 6 is damaged")

    made = batches(Rows(before))
    made.take(0, 0)
    made.take(0, 1)
    with pytest.raises(UserError, match="sample 6 is damaged"):
        made.take(0, 2)
    made.close()


def test_the_loss_prepares_a_batch_on_the_host(ahead):
    class Prepared:
        def prepare(self, batch: Batch) -> Batch:
            return {**batch, "thread": torch.tensor(threading.current_thread() is not threading.main_thread())}

    made = Batches(SETTINGS, Ranks(0, 1, CPU), Rows(), Prepared())
    assert made.take(0, 0)["thread"]
    made.close()


def test_a_run_whose_batches_are_made_ahead_is_the_same_to_the_bit_and_leaves_no_thread(make, ahead, monkeypatch):
    options = dict(max_steps=3, micro_tokens=3 * TIME)
    trainer = make("ahead", **options)
    trainer.run()
    assert trainer.batches._ahead == training.batches.deque() and threads() == []
    monkeypatch.setattr(training.batches, "is_made_ahead", lambda device: False)
    make("in turn", **options).run()
    ours, theirs = (files(trainer.out.parent / out / "final") for out in ("ahead", "in turn"))
    assert ours == theirs


def test_a_run_that_ends_by_an_error_leaves_no_thread(make, ahead):
    def before(indices: Sequence[int]) -> None:
        if indices[0] == 2 * ROWS:
            raise UserError("no more rows")

    trainer = make(dataset=Rows(before), max_steps=4)
    with pytest.raises(UserError, match="no more rows"):
        trainer.run()
    assert threads() == [] and trainer.progress.step == 2
