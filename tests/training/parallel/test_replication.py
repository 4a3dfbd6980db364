"""Ranks that differ in what must be the same stop at once and say in what; silent ones are named."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import Forked, on_ranks
from toy_stage import ROWS, Rows

from errors import UserError, command_line
from model import MiniDeepSeek
from training.parallel import rank_checks, replication
from training.parallel.dist_settings import DistSettings
from training.parallel.rank_checks import check_facts, checksums, code_version, facts, flat
from training.parallel.ranks import Ranks
from training.trainer import Trainer


class Copy:
    """What DistributedDataParallel is asked for."""

    def __init__(self, module: object, device_ids: object, gradient_as_bucket_view: bool, **others: bool) -> None:
        self.others = others


class Older(Copy):
    def __init__(self, *given: object, broadcast_buffers: bool = True, **named: bool) -> None:
        super().__init__(*given, broadcast_buffers=broadcast_buffers, **named)


class Newer(Copy):
    def __init__(self, *given: object, forward_sync_buffers: bool = True, **named: bool) -> None:
        super().__init__(*given, forward_sync_buffers=forward_sync_buffers, **named)


@pytest.mark.parametrize(("kind", "name"), [(Older, "broadcast_buffers"), (Newer, "forward_sync_buffers")])
def test_buffers_are_sent_by_no_torch(kind, name, monkeypatch):
    monkeypatch.setattr(replication, "DistributedDataParallel", kind)
    assert replication.replicate(torch.nn.Linear(1, 1), Ranks(0, 2, torch.device("cpu"))).others == {name: False}


@pytest.fixture
def together(make, tmp_path) -> Callable[..., list[Forked]]:
    """`together(upset, options of rank -> changes)`: a run on two ranks; `upset(trainer, rank)` comes before it."""

    def call(
        upset: Callable[[Trainer, int], object] = lambda *_: None, patience: float = 60.0, **of_rank_1: object
    ) -> list[Forked]:
        def train(rank: int) -> None:
            options = {"max_steps": 6, "dist": DistSettings(timeout=patience, check_every=2), "save_every": 2}
            ranks = Ranks.start("cpu", timeout=patience)
            trainer = make(ranks=ranks, **{**options, **(of_rank_1 if rank else {})})
            upset(trainer, rank)
            command_line(trainer.run)

        return on_ranks(2, train, tmp_path)

    return call


def error(ranks: list[Forked]) -> str:
    """What was told, once, by two ranks that both failed with code 2."""
    said = "".join(rank.output() for rank in ranks)
    assert [rank.code for rank in ranks] == [2, 2] and "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


def test_a_checksum_depends_on_the_place_of_each_number():
    numbers = torch.arange(2**19 + 3, dtype=torch.float32)
    sums = {rank_checks.checksum(numbers).item()}
    for one, other in ((0, 1), (2, 2**18 + 2), (5, 2**19 + 1)):
        swapped = numbers.clone()
        swapped[one], swapped[other] = numbers[other], numbers[one]
        sums.add(rank_checks.checksum(swapped).item())
    sums.add(rank_checks.checksum(numbers.roll(2**18)).item())
    assert len(sums) == 5
    assert rank_checks.checksum(numbers.bfloat16()) != rank_checks.checksum(numbers.bfloat16().flip(0))


def test_a_gpu_sums_in_larger_parts_what_a_cpu_sums_in_small_ones(on_cuda, monkeypatch):
    """No part is left out, and all sums are read at once."""
    monkeypatch.setattr(rank_checks, "LARGE_PART", 1000)
    numbers = torch.arange(2500, dtype=torch.float32)
    bits = numbers.view(torch.int32).long()
    parts = [(part * (2 * torch.arange(len(part)) + 1)).sum() for part in bits.split(1000)]
    assert rank_checks.checksum(numbers) == 31 * (31 * parts[0] + parts[1]) + parts[2]
    assert rank_checks.listed({"a": torch.tensor(2**62), "b": torch.tensor(-3)}) == (["a", "b"], [2**62, -3])


def test_two_ranks_that_agree_train(together, tmp_path):
    assert [rank.code for rank in together()] == [0, 0]
    assert (tmp_path / "run" / "final").is_dir()


def test_another_setting_on_a_rank_stops_the_run_before_it_begins(together, tmp_path):
    assert "rank 1 disagrees with rank 0: run.seed = 1, not 0" in error(together(seed=1))
    assert not (tmp_path / "run").exists()


class Disagreeing(Ranks):
    """The main rank of two; the other one's facts are its own but for `change`."""

    def gather(self, value: dict) -> list[dict]:
        return [value, {**value, **self.change}]


WEIGHT = "weights.lm_head.weight"


@pytest.mark.parametrize("name", ["settings.bias_speed", "model.vocab_size", "code", "run.tokenizer", "torch", WEIGHT])
def test_any_fact_that_differs_is_named(name, make):
    trainer, ranks = make(), Disagreeing(0, 2, torch.device("cpu"))
    object.__setattr__(ranks, "change", {name: 5})
    with pytest.raises(UserError, match=f"rank 1 disagrees with rank 0: {name} = 5, not "):
        check_facts(ranks, facts(trainer.settings, trainer.progress.run, trainer.model))


def test_weights_that_drift_apart_are_found_at_the_next_check(together, tmp_path):
    """A bit flips in the memory of rank 1 in its third step."""

    def drift(trainer: Trainer, rank: int) -> None:
        def before(indices) -> None:
            if rank and indices[0] == 2 * ROWS + ROWS // 2:
                with torch.no_grad():
                    trainer.model.model.norm.weight.view(torch.int32)[3] ^= 1

        trainer.dataset = Rows(before)

    assert "rank 1 disagrees with rank 0 after step 4: " in error(together(drift))
    assert not (tmp_path / "run" / "step-4").exists() and (tmp_path / "run" / "step-2").is_dir()


def test_a_rank_that_sleeps_is_named_after_the_timeout(together, tmp_path):
    def sleep(trainer: Trainer, rank: int) -> None:
        trainer.dataset = Rows(lambda indices: time.sleep(5) if indices[0] == 2 * ROWS + ROWS // 2 else None)

    ranks = together(sleep, patience=3.0)
    assert ranks[0].code == 2 and "Traceback" not in ranks[0].output()
    last = ranks[0].output().strip().splitlines()[-1]
    assert last.startswith("error: rank 0: no answer from rank 1 in 3 s; ") and "--dist.timeout" in last
    assert (tmp_path / "run" / "step-2").is_dir()


def test_a_rank_that_dies_ends_the_others_in_one_line(together):
    def die(trainer: Trainer, rank: int) -> None:
        trainer.dataset = Rows(lambda indices: exit(7) if indices[0] == 2 * ROWS + ROWS // 2 else None)

    ranks = together(die)
    assert [rank.code for rank in ranks] == [2, 7]
    assert ranks[0].output().strip().splitlines()[-1].startswith("error: rank 0: another rank has ended")


def test_one_bit_of_any_weight_or_router_bias_changes_its_checksum(tiny_model):
    model: MiniDeepSeek = tiny_model()
    before = checksums(model)
    assert before.keys() >= {name for name, _ in model.named_parameters()}
    assert any(name.endswith("e_score_correction_bias") for name in before)
    state = model.state_dict()
    for name in before:
        state[name].view(torch.int32).view(-1)[-1] ^= 1
        assert checksums(model)[name] != before[name], name


def test_any_change_of_the_sources_is_another_version(tmp_path, monkeypatch):
    (tmp_path / "model" / "kernels").mkdir(parents=True)
    for name in ("pretrain.py", "model/moe.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(rank_checks, "ROOT", tmp_path)
    versions = [code_version()]
    (tmp_path / "model" / "moe.py").write_text("x = 2\n")
    versions.append(code_version())
    Path(tmp_path / "model" / "moe.py").rename(tmp_path / "model" / "mla.py")
    versions.append(code_version())
    for name in ("kernels/rows.h", "kernels/decode.c"):
        (tmp_path / "model" / name).write_text("int x;")
        versions.append(code_version())
    assert len(set(versions)) == 5


def test_settings_within_settings_are_named_with_a_dot():
    found = flat({"a": DistSettings(timeout=5.0, check_every=2), "b": 1})
    assert found == {"a.timeout": 5.0, "a.check_every": 2, "a.gradients": "fp32", "b": 1}
