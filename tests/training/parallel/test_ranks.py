"""Several processes train as one, on CPUs with gloo."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from conftest import call_main
from forked import on_ranks
from toy_stage import TIME

import pretrain
from errors import UserError
from training.optim.build import OptimSettings
from training.parallel.dist_settings import DistSettings
from training.parallel.group import RankGroup
from training.parallel.ranks import Ranks
from training.parallel.replication import replicate
from training.run.log import read_metrics
from training.schedule import value_at

# A large epsilon keeps AdamW from turning the rounding of tiny gradients into whole steps.
RECIPE = [
    "--micro_tokens", 256, "--mtp_weight", '{"0": 0, "0.5": 0.3}', "--optim.eps", 1e-3, "--max_steps", 3,
]  # fmt: skip


def test_two_ranks_train_as_one_process_does(pretrain_arguments, tmp_path, run):
    """16 rows a step: 4 micro-batches on one process, 2 on each of two; rank 1 waits for the shards of rank 0.

    In the first step the MTP layer takes no part.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(pretrain.main, *pretrain_arguments, *RECIPE, "--out", one).code == 0
    given = [*pretrain_arguments, *RECIPE, "--out", two, "--shards", tmp_path / "shards"]
    ranks = on_ranks(2, lambda rank: call_main(pretrain.main, *given), tmp_path)
    said = [rank.output() for rank in ranks]
    assert [rank.code for rank in ranks] == [0, 0], said
    assert "16 rows of 64 tokens: 2 ranks, 2 micro-batches of 4 rows" in said[0]
    assert said[0].count("finished: ") == 1 and "finished" not in said[1]  # one process speaks
    alone, together = (read_metrics(out / "metrics.jsonl") for out in (one, two))
    assert ["mtp_loss" in entry for entry in alone] == [False, False, True, True]
    for ours, theirs in zip(together, alone, strict=True):
        for name in ours.keys() & {"step", "loss", "mtp_loss", "grad_norm", "val_bits_per_byte", "max_vio"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_gradients_may_travel_in_bfloat16(make, tmp_path):
    """All ranks get the same bits of them, a little rounded."""
    with pytest.raises(UserError, match="gradients fp16: one of fp32, bf16"):
        DistSettings(gradients="fp16")

    def train(kind: str, rank: int) -> None:
        options = dict(max_steps=2, dist=DistSettings(check_every=1, gradients=kind), optim=OptimSettings(eps=1e-3))
        make(kind, ranks=Ranks.start("cpu", timeout=30.0), **options).run()

    norms = []
    for kind in ("fp32", "bf16"):
        ranks = on_ranks(2, partial(train, kind), tmp_path)
        assert [rank.code for rank in ranks] == [0, 0], ranks[0].output() + ranks[1].output()
        norms.append(read_metrics(tmp_path / kind / "metrics.jsonl")[1]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-2) and norms[1] != norms[0]


def test_one_process_needs_no_torchrun():
    ranks = Ranks.start("cpu")
    assert (ranks.rank, ranks.world, ranks.device.type, ranks.main) == (0, 1, "cpu", True)
    model = torch.nn.Linear(2, 2)
    assert replicate(model, ranks) is model and ranks.sum(torch.ones(2)).tolist() == [1, 1]


def test_an_error_of_ones_own_is_not_blamed_on_a_peer():
    with pytest.raises(RuntimeError, match="out of memory"), RankGroup(0, 2, torch.device("cpu")).explained():
        raise RuntimeError("CUDA out of memory")


SCHEDULES = {
    "first": ({"0": 0.3, "0.5": 0.0}, False),
    "between, tied": ({"0": 0.0, "0.5": 0.3, "0.75": 0.0}, True),
}


@pytest.mark.parametrize(("mtp_weight", "tied"), SCHEDULES.values(), ids=SCHEDULES)
def test_an_mtp_layer_that_rests_keeps_no_rank_waiting(mtp_weight, tied, make, tmp_path):
    """The head is used after `forward`, where DistributedDataParallel cannot see it; gradients equal one process's."""
    options = dict(mtp_weight=mtp_weight, micro_tokens=2 * TIME, optim=OptimSettings(eps=1e-2), max_steps=4)

    def train(out: str, rank: int, world: int) -> None:
        ranks = Ranks.start("cpu", timeout=30.0) if world > 1 else None
        trainer, found = make(out, ranks=ranks, model={"tie_word_embeddings": tied}, **options), []
        step = trainer.optimizer.step

        def spy() -> None:
            found.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
            step()

        trainer.optimizer.step = spy
        trainer.run()
        torch.save(found, tmp_path / f"{out}-{rank}.pt")

    done = on_ranks(2, lambda rank: train("two", rank, 2), tmp_path)
    assert [rank.code for rank in done] == [0, 0], "".join(rank.output() for rank in done)
    train("one", 0, 1)
    alone, *together = (torch.load(tmp_path / name) for name in ("one-0.pt", "two-0.pt", "two-1.pt"))
    for step, want in enumerate(alone, 1):
        weight = value_at(mtp_weight, step / 4)
        assert any(name.startswith("mtp.") for name in want) == (weight > 0)
        for got in (gradients[step - 1] for gradients in together):
            assert got.keys() == want.keys()
            for name in want:
                torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-7, msg=name)


def test_wrapping_again_leaves_no_wrapper_behind(make, tmp_path):
    """Nor its buckets, which are as large as the gradients."""

    def train(rank: int) -> None:
        trainer = make(ranks=Ranks.start("cpu", timeout=30.0), mtp_weight={"0": 0.0, "0.5": 0.3})
        wrap, wrapped = trainer._replicate, []

        def spy() -> None:
            wrap()
            wrapped.append(weakref.ref(trainer.copies.module))

        trainer._replicate = spy
        trainer.run()
        assert len({id(one()) for one in wrapped}) == 2 and wrapped[0]() is None and wrapped[-1]() is not None

    done = on_ranks(2, train, tmp_path)
    assert [rank.code for rank in done] == [0, 0], "".join(rank.output() for rank in done)
