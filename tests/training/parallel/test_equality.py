"""However a step is cut, into micro-batches, ranks or recomputed layers, it is the same step; so are its measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from forked import at_scale, on_ranks
from safetensors.torch import load_file
from toy_stage import ROWS, TIME, Rows, files

from training.losses import IGNORE, Batch, NextTokenLoss
from training.optim.build import OptimSettings
from training.parallel.ranks import Ranks
from training.run.log import read_metrics
from training.run.state import read_state
from training.trainer import Trainer

# With a large epsilon AdamW does not turn the rounding of a tiny gradient into a whole step.
OPTIONS = dict(max_steps=2, balance_weight=0.1, optim=OptimSettings(eps=1e-2, warmup=0.0, decay_from=1.0))
MEASURES = ("loss", "total_loss", "mtp_loss", "balance_loss", "grad_norm", "val_loss", "val_bits_per_byte")


class Uneven(Rows):
    """Rows with more and more labels that count, so that a mean of means is not the mean."""

    def batch(self, indices: Sequence[int]) -> Batch:
        batch = super().batch(indices)
        counted = torch.tensor([1 + (3 * index) % ROWS for index in indices])
        return {**batch, "labels": batch["labels"].masked_fill(torch.arange(TIME) >= counted[:, None], IGNORE)}


class Packed(Uneven):
    """Two or three samples a row that do not see each other."""

    def batch(self, indices: Sequence[int]) -> Batch:
        segments = torch.stack([torch.arange(TIME) // (5 + index % 3) for index in indices])
        starts = torch.stack([torch.arange(TIME) % (5 + index % 3) for index in indices])
        return {**super().batch(indices), "segment_ids": segments, "position_ids": starts}


CUT = {"micro_tokens": 3 * TIME, "gradient_checkpointing": True}
CASES = {  # rows, model, and how the step is cut where it is compared with the whole one on one process
    "accumulated": (Uneven, {}, {"micro_tokens": TIME}),
    "packed": (Packed, {}, {}),
    "two MTP layers": (Uneven, {"num_nextn_predict_layers": 2}, {}),
    "no experts": (Uneven, {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0}, {}),
    "all at once": (Packed, {"num_nextn_predict_layers": 2}, CUT),
}


@pytest.fixture
def train(make, tmp_path) -> Callable[..., Path]:
    """`train(out, world, dataset, **options)`: a run on so many ranks. Returns its folder."""

    def train(out: str, world: int, dataset: type[Rows] = Uneven, **options: object) -> Path:
        def of_rank(rank: int) -> None:
            make(out, dataset(), ranks=Ranks.start("cpu", timeout=30), **{**OPTIONS, **options}).run()

        ranks = on_ranks(world, of_rank, tmp_path)
        assert [rank.code for rank in ranks] == [0] * world, "".join(rank.output() for rank in ranks)
        return tmp_path / out

    return train


def assert_the_same_training(ours: Path, theirs: Path) -> None:
    """Weights, moments and measures equal to rounding; router biases, loads and counts equal."""
    names = ["model.safetensors"] + ["mtp.safetensors"] * (ours / "final" / "mtp.safetensors").exists()
    pairs = [[load_file(out / "final" / name) for out in (ours, theirs)] for name in names]
    for one, other in [*pairs, [read_state(out / "final", "") for out in (ours, theirs)]]:
        assert one.keys() == other.keys()
        for key in one:
            if key.endswith("e_score_correction_bias"):
                assert torch.equal(one[key], other[key]), key
            else:
                torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-6, msg=key)
    logs = [read_metrics(out / "metrics.jsonl") for out in (ours, theirs)]
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        for measure in one.keys() & set(MEASURES):
            assert one[measure] == pytest.approx(other[measure], rel=1e-4), measure
        for count in ("step", "tokens", "labels", "max_vio", "skipped"):
            assert one.get(count) == other.get(count), count


@pytest.mark.parametrize("ranks", [2, *at_scale(4)])
@pytest.mark.parametrize("case", CASES)
def test_ranks_train_as_one_process_does(case, ranks, train):
    dataset, model, cut = CASES[case]
    one = train("one", 1, dataset, model=model)
    for world in (1, ranks) if cut else (ranks,):
        assert_the_same_training(train(f"on {world}", world, dataset, model=model, **cut), one)


def test_a_run_goes_on_from_one_rank_to_two_and_back(train):
    """A step on each: the same data in the same order, in steps of the same size."""
    whole = train("whole", 1, max_steps=3, val_every=1)
    for world, steps in ((1, 1), (2, 2), (1, 3)):
        moved = train("moved", world, max_steps=steps, val_every=1, resume=True)
    assert_the_same_training(moved, whole)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_seed_gives_the_same_bits_and_another_gives_others(ranks, train):
    first, second, other = (train(f"run {number}", ranks, seed=number // 2) for number in range(3))
    assert files(first / "final") == files(second / "final")
    assert files(first / "final") != files(other / "final")


def truth(trainer: Trainer) -> dict[str, object]:
    """Loads, losses and labels of the first step, from one row at a time through a model that is not in training."""
    loss = NextTokenLoss(mtp=True, balance_weight=0.1)
    sums: dict[str, torch.Tensor] = {}
    for index in range(ROWS):
        total, labels, metrics = loss(trainer.model, trainer.dataset.batch([index]))
        total.backward()
        for name, value in {"total": total, "labels": labels, **metrics}.items():
            sums[name] = sums.get(name, 0) + value.detach().double()
    count = sums.pop("labels").item()
    means = {name: value if name == "counts" else value.item() / count for name, value in sums.items()}
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
    return {**means, "labels": count, "grad_norm": norm.item() / count}


def assert_measured(found: dict[str, object], want: dict[str, object]) -> None:
    assert torch.equal(found["counts"].double(), want["counts"]) and found["labels"] == want["labels"]
    for name in ("total", "main", "mtp", "balance", "grad_norm"):
        assert found[name] == pytest.approx(want[name], rel=1e-5 if name != "grad_norm" else 1e-4), name


@pytest.fixture
def measure(make, tmp_path, monkeypatch) -> Callable[..., tuple[dict[str, object], dict[str, object]]]:
    """`measure(world, **options)`: what one step says of itself on so many ranks, and the truth."""
    step = Trainer.advance

    def tell(trainer: Trainer) -> object:
        result, lr = step(trainer)
        told = {"total": result.loss, "labels": result.labels, "counts": result.counts, **result.metrics}
        told["grad_norm"] = result.grad_norm
        torch.save(told, tmp_path / f"step-of-{trainer.ranks.rank}.pt")
        return result, lr

    def measure(world: int, **options: object) -> tuple[dict[str, object], dict[str, object]]:
        monkeypatch.setattr(Trainer, "advance", tell)
        given = {**OPTIONS, "max_steps": 1, "mtp_weight": 0.3, **options}
        ranks = on_ranks(
            world, lambda rank: make("run", Uneven(), ranks=Ranks.start("cpu", timeout=30), **given).run(), tmp_path
        )
        assert [rank.code for rank in ranks] == [0] * world, ranks[0].output()
        found = [torch.load(tmp_path / f"step-of-{rank}.pt") for rank in range(world)]
        for other in found[1:]:
            assert_measured(other, found[0])
        return found[0], truth(make("truth", Uneven(), **given))

    return measure


@pytest.mark.parametrize("ranks", [1, 2, *at_scale(4)])
def test_loads_losses_and_norms_are_right_however_the_step_is_cut(ranks, measure):
    assert_measured(*measure(ranks, **{1: {"micro_tokens": 3 * TIME}, 2: CUT, 4: {}}[ranks]))
