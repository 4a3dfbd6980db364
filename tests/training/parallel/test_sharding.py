"""However weights, gradients, optimiser state and experts are cut among ranks, they train as one process does."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from forked import Forked, at_scale, on_ranks
from safetensors.torch import load_file
from test_equality import OPTIONS, Packed, Uneven, assert_the_same_training
from torch.distributed import checkpoint, set_debug_level_from_env
from toy_stage import ROWS, TIME, Maker, Rows, files

from errors import UserError, command_line
from LMConfig import LMConfig
from model import MiniDeepSeek
from training.optim.build import OptimSettings
from training.parallel.dist_settings import ShardSettings
from training.parallel.mesh_checks import check_mesh
from training.parallel.ranks import Ranks
from training.run.log import read_metrics
from training.run.state import read_state
from training.settings import NextTokenSettings
from training.trainer import Trainer

HALVES = {"micro_tokens": 2 * TIME}
CUT = HALVES | {"gradient_checkpointing": True}
TILE = 128  # tokens whose gradients share a scale (--fp8)
TIED = {"tie_word_embeddings": True}
CASES = {  # how two ranks cut, rows, model, and how the step is cut; more meshes are in check_scale.py
    "zero 1, accumulated": ({"zero": 1}, Uneven, {}, HALVES),
    "zero 3, ep 2, tied, recomputed": ({"zero": 3, "ep": 2}, Packed, TIED, CUT),
    "pp 2, zbv, recomputed": ({"pp": 2, "schedule": "zbv"}, Packed, {}, CUT),
    "pp 2, dualpipev, tied": ({"pp": 2, "schedule": "dualpipev"}, Uneven, TIED, HALVES),
}
CLOSE = {"zero": 3, "ep": 2}
FOLDED = {"pp": 2, "schedule": "zbv"}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Once, and not in each process that is forked."""
    for name in ("torch._dynamo", "training.parallel.sharding"):
        import_module(name)


@pytest.fixture
def train(make, tmp_path) -> Callable[..., Path]:
    """`train(out, world, dataset, cut, **options)`: a run on so many ranks. Returns its folder."""

    def train(out: str, world: int, dataset: type[Rows] = Uneven, cut: dict | None = None, **options: object) -> Path:
        given = {**OPTIONS, "dist": ShardSettings(**(cut or {})), **options}

        def of_rank(rank: int) -> None:
            set_debug_level_from_env()
            with nothing_left_behind():
                command_line(lambda: make(out, dataset(), ranks=Ranks.start("cpu", timeout=30), **given).run())

        ranks = on_ranks(world, of_rank, tmp_path)
        assert [rank.code for rank in ranks] == [0] * world, "".join(rank.output() for rank in ranks)
        return tmp_path / out

    return train


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """After the second step there are as many hooks on modules and weights as after the first."""
    step, counts = Trainer.advance, []

    def counted(trainer: Trainer) -> object:
        result = step(trainer)
        modules, weights = [*trainer.copies.modules()] if trainer.shards else [], [*trainer.model.parameters()]
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        counts.append(sum(len(getattr(one, kind, None) or ()) for one in modules + weights for kind in kinds))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", counted)
        yield
    assert len({*counts}) <= 1, counts


def assert_nearly_the_same(cut: Path, one: Path) -> None:
    for ours, theirs in zip(*(read_metrics(out / "metrics.jsonl") for out in (cut, one)), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-2)


@pytest.fixture(scope="module")
def runs() -> dict[str, Path]:
    """Of one process, by what they trained."""
    return {}


@pytest.fixture
def alone(train, runs) -> Callable[..., Path]:
    """`alone(dataset, **options)`: the run of one process, made once for all that are compared with it."""

    def alone(dataset: type[Rows], **options: object) -> Path:
        key = repr((dataset, options))
        if key not in runs:
            runs[key] = train("one", 1, dataset, **options)
        return runs[key]

    return alone


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_cut_train_as_one_process_does(case, train, alone):
    """Weights, moments, router biases, losses, gradient norms and held-out losses of two steps."""
    cut, dataset, model, options = CASES[case]
    one = alone(dataset, model=model, val_every=2)
    assert_the_same_training(train("cut", 2, dataset, cut, model=model, val_every=2, **options), one)


FP8 = {  # how ranks cut, tokens of a micro-batch on one process, and the model
    "ep 2": ({"ep": 2}, 2 * TILE, {"num_nextn_predict_layers": 0}),
    "pp 2, zbv": ({"pp": 2, "schedule": "zbv"}, TILE, {}),
}


@pytest.mark.parametrize("case", FP8)
def test_products_in_fp8_are_those_of_one_process(case, train):
    """Where numbers that share a scale there do so here: ranks have whole tiles of tokens, experts the same rows."""
    cut, micro, model = FP8[case]
    given = dict(fp8=True, batch_tokens=2 * TILE, max_steps=2, model=model)
    one = train("one", 1, micro_tokens=micro, **given)
    assert_the_same_training(train("cut", 2, cut=cut, micro_tokens=TILE, **given), one)


def test_weights_become_fp8_before_anything_has_rounded_them(train):
    """Gathered in bfloat16, as products in that want them, they would be others than on one process."""
    given = dict(fp8=True, dtype="bf16", batch_tokens=2 * TILE, micro_tokens=TILE, max_steps=2)
    runs = train("cut", 2, cut={"zero": 3}, **given), train("one", 1, **given)
    cut, one = (read_metrics(out / "metrics.jsonl")[1]["loss"] for out in runs)
    assert cut == pytest.approx(one, rel=1e-7)
    assert_nearly_the_same(*runs)


@pytest.mark.parametrize("cut", [{"zero": 1}, {"pp": 2}, *at_scale(FOLDED)])
def test_an_mtp_chain_without_weight_has_no_part_until_it_has_one(cut, train, alone):
    late = {"mtp_weight": {"0": 0.0, "0.6": 0.3}, "dtype": "bf16"}
    assert_nearly_the_same(train("cut", 2, cut=cut, **HALVES, **late), alone(Uneven, **late))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("meshes", [(CLOSE, FOLDED), *at_scale(({"zero": 3}, {"pp": 2}, {"ep": 2}))])
def test_a_run_goes_from_mesh_to_mesh_and_to_one_process(meshes, train, monkeypatch):
    """One step on each: weights, moments and the order of the data go with it. No rank has all of it to write."""
    saved = import_module("training.parallel.saved")
    gather = saved.ShardedModel.tensors

    def tensors(weights: object) -> dict[str, torch.Tensor]:
        found, whole = gather(weights), sum(t.nbytes for t in saved.meta_state(weights.model.config).values())
        assert 0 < sum(tensor.nbytes for tensor in found.values()) < 0.9 * whole
        return found

    monkeypatch.setattr(saved.ShardedModel, "tensors", tensors)
    monkeypatch.setattr(saved, "LARGEST", 60_000)
    whole = train("whole", 1, max_steps=len(meshes) + 1, val_every=1)
    for step, cut in enumerate((*meshes, {}), 1):
        moved = train("moved", 2 if cut else 1, cut=cut, max_steps=step, val_every=1, resume=True, **HALVES)
        if cut:
            written_by_ranks(moved / "final")
    assert_the_same_training(moved, whole)


def written_by_ranks(final: Path) -> None:
    """Files that list one another, and state that torch.distributed.checkpoint reads as we do."""
    places = json.loads((final / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({*places.values()}) > 2 and not (final / "model.safetensors").exists()
    assert all(name in load_file(final / file) for name, file in places.items())
    state = read_state(final, "")
    theirs = {name: torch.full_like(tensor, -1.0) for name, tensor in state.items()}
    checkpoint.load(theirs, storage_reader=checkpoint.HuggingFaceStorageReader(str(final / "training")), no_dist=True)
    assert len(state) > 50 and all(torch.equal(theirs[name], state[name]) for name in state)


@pytest.mark.parametrize("cut", [CLOSE, *at_scale({"pp": 2})])
def test_a_run_that_resumes_on_the_same_mesh_is_the_same_to_the_bit(cut, train):
    whole = train("whole", 2, cut=cut, save_every=1, keep=9, **HALVES)
    ended = files(whole / "final")
    shutil.rmtree(whole / "final")
    resumed = train("whole", 2, cut=cut, resume=True, **HALVES)
    assert files(resumed / "final") == ended
    assert len(read_metrics(resumed / "metrics.jsonl")) == 3


@pytest.mark.parametrize("cut", [CLOSE, FOLDED])
def test_in_bfloat16_what_is_cut_is_near_what_is_not(cut, train, alone, monkeypatch):
    """Weights are rounded before they are gathered, gradients summed in float32: the router is rounded in neither."""
    if "pp" in cut:  # its stages then compare types with those that they expect
        monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    one = alone(Packed, dtype="bf16")
    cut = train("cut", 2, Packed, cut, dtype="bf16", **CUT)
    assert_nearly_the_same(cut, one)


@pytest.mark.parametrize("cut", [CLOSE, {"pp": 2}])
def test_a_signal_to_one_rank_saves_what_all_have(cut, make, tmp_path):
    def of_rank(rank: int) -> None:
        def before(indices: Sequence[int]) -> None:
            if rank and indices[0] in (ROWS, ROWS + ROWS // 2):  # its first of step 2
                os.kill(os.getpid(), signal.SIGTERM)

        given = {**OPTIONS, "dist": ShardSettings(**cut), **HALVES}
        command_line(make(dataset=Rows(before), ranks=Ranks.start("cpu", timeout=30), **given | {"max_steps": 6}).run)

    ranks = on_ranks(2, of_rank, tmp_path)
    assert [rank.code for rank in ranks] == [0, 0], "".join(rank.output() for rank in ranks)
    step = 2 if "pp" in cut else 1  # a pipeline ends the step it is in
    assert "interrupted: saved" in ranks[0].output() and (tmp_path / "run" / f"step-{step}").is_dir()


def in_step_two(deed: Callable[[], object], timeout: float, cut: dict, make: Maker, folder: Path) -> list[Forked]:
    """Two ranks, of which the second does it."""

    def of_rank(rank: int) -> None:
        rows = Rows(lambda indices: deed() if rank and indices[0] >= ROWS else None)
        given = {**OPTIONS, "dist": ShardSettings(**cut), **HALVES}
        command_line(make(dataset=rows, ranks=Ranks.start("cpu", timeout=timeout), **given).run)

    return on_ranks(2, of_rank, folder)


@pytest.mark.parametrize("cut", [{"pp": 2}, *at_scale({"zero": 1}, CLOSE, {"pp": 2, "schedule": "dualpipev"})])
def test_a_rank_that_sleeps_is_named(cut, make, tmp_path):
    ranks = in_step_two(lambda: time.sleep(7), 5, cut, make, tmp_path)
    assert ranks[0].code == 2 and "Traceback" not in ranks[0].output()
    assert ranks[0].output().strip().splitlines()[-1].startswith("error: rank 0: no answer from rank 1 in 5 s; ")


@pytest.mark.parametrize("cut", [CLOSE, {"pp": 2}, *at_scale({"pp": 2, "schedule": "dualpipev"})])
def test_a_rank_that_dies_ends_the_run_in_one_line(cut, make, tmp_path):
    ranks = in_step_two(lambda: os._exit(9), 30, cut, make, tmp_path)
    assert [rank.code for rank in ranks] == [2, 9]
    (line,) = [line for line in ranks[0].output().splitlines() if "error" in line or "Traceback" in line]
    assert line == "error: rank 0: another rank has ended; its own message says why"


def test_a_rank_that_cannot_write_its_share_ends_the_run_in_one_line(make, tmp_path, monkeypatch):
    def of_rank(rank: int) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if rank:
            monkeypatch.setattr("training.run.checkpoint.save_file", full)
        given = {**OPTIONS, "dist": ShardSettings(zero=3), "max_steps": 1}
        command_line(make(ranks=Ranks.start("cpu", timeout=30), **given).run)

    ranks = on_ranks(2, of_rank, tmp_path)
    assert [rank.code for rank in ranks] == [2, 2]
    (line,) = [line for rank in ranks for line in rank.output().splitlines() if "error" in line or "Traceback" in line]
    assert "final: could not be saved ([Errno 28] rank 1: No space left on device); no checkpoint" in line
    assert not [*(tmp_path / "run").glob("*final*")]


def test_ranks_that_begin_with_other_weights_stop_before_they_are_cut(make, tmp_path):
    def of_rank(rank: int) -> None:
        given = {**OPTIONS, "dist": ShardSettings(pp=2), "micro_tokens": TIME, "seed": rank}
        command_line(lambda: make(ranks=Ranks.start("cpu", timeout=30), **given).run())

    ranks = on_ranks(2, of_rank, tmp_path)
    assert [rank.code for rank in ranks] == [2, 2]
    assert "rank 1 disagrees with rank 0: run.seed = 1, not 0" in ranks[0].output()


def test_what_does_not_go_together_is_refused_in_one_line(make):
    settings = NextTokenSettings(out="none", batch_tokens=8 * 512, micro_tokens=2 * 512, dist=ShardSettings(zero=1))
    config = LMConfig.preset("demo", n_routed_experts=4, n_group=1, topk_group=1)
    for change, world, says in (
        (dict(dist=ShardSettings(ep=3)), 8, "--dist.ep 3: does not divide the 8 ranks"),
        (dict(dist=ShardSettings(pp=2, ep=3)), 8, "--dist.pp 2 and --dist.ep 3: do not divide the 8 ranks"),
        (dict(dist=ShardSettings(pp=8)), 8, "--dist.pp 8: 8 stages (1f1b), but the model has"),
        (dict(dist=ShardSettings(pp=2, zero=3)), 8, "--dist.zero 3: does not go with --dist.pp 2"),
        (dict(dist=ShardSettings(pp=2), carry_optimizer=True), 8, "--carry_optimizer: does not go with --dist.pp 2"),
        (
            dict(dist=ShardSettings(pp=2), micro_tokens=3 * 512),
            2,
            "--micro_tokens 1536 does not cut the 8 rows",
        ),
        (dict(dist=ShardSettings(pp=2)), 8, "--dist.pp 2: 1f1b needs 2 micro-batches of a pipeline, a step has 1; "),
        (dict(dist=ShardSettings(ep=8)), 8, "--dist.ep 8: does not divide --model.n_routed_experts 4"),
        (dict(optim=OptimSettings(kind="muon")), 8, "--optim.kind muon: needs whole matrices, --dist.zero 1 cuts them"),
        (dict(compile=True), 8, "--compile true: does not go with --dist.zero 1"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            check_mesh(replace(settings, **change), world, config)
    with torch.device("meta"):
        adapted = MiniDeepSeek(config)
    adapted.model.layers.requires_grad_(False)
    with pytest.raises(UserError, match=r"--dist.pp 2: nothing trains in stage 1 of 2 \(1f1b\); .* --lora.targets att"):
        import_module("training.parallel.mesh_checks").check_stages(adapted, ShardSettings(pp=2))
    for zero in (2, 4):
        with pytest.raises(UserError, match=f"--dist.zero {zero}: one of 0, 1, 3"):
            ShardSettings(zero=zero)
