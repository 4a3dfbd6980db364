"""A batch that grows along the run: every sample once, resumed to the bit, each share of the limit that was given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from demo_settings import read, settings_of
from forked import on_ranks
from toy_stage import TIME, Maker, Rows
from victim import differences

from cli import parse
from errors import UserError
from LMConfig import LMConfig
from training.optim.build import OptimSettings
from training.parallel.dist_settings import ShardSettings
from training.parallel.mesh_checks import check_mesh
from training.parallel.ranks import Ranks
from training.run.log import read_metrics
from training.run.progress import read_progress
from training.schedule import Budget, learning_rate
from training.settings import NextTokenSettings
from training.trainer import Trainer

GROWS = {"0": 2 * TIME, "0.5": 6 * TIME}
SIX_OF_2_TWO_OF_6 = dict(max_steps=None, max_tokens=24 * TIME, batch_tokens=GROWS, micro_tokens=4 * TIME)


def asked_of(make: Maker, *arguments: object, **options: object) -> tuple[Trainer, list[list[int]]]:
    """Run it, and return also the samples of each micro-batch of training."""
    asked: list[list[int]] = []
    trainer = make(*arguments, dataset=Rows(lambda indices: asked.append(list(indices))), **options)
    trainer.run()
    return trainer, asked


def budget(sizes: dict[str, int], samples: int = 20, **limits: object) -> Budget:
    return NextTokenSettings(out="o", sequence_length=5, batch_tokens=sizes, **limits).budget(samples)


def sizes_of(budget: Budget) -> list[int]:
    steps = [budget.batches.of_step(step) for step in range(budget.max_steps)]
    assert [sample for step in steps for sample in step] == list(range(budget.batches.samples))
    return [len(step) for step in steps]


@pytest.mark.parametrize(
    ("limits", "sizes", "by"),
    [
        ({"max_steps": 6}, [1, 1, 1, 4, 4, 4], "--max_steps 6"),  # half of the steps
        ({"max_tokens": 80}, [1] * 8 + [4, 4], "--max_tokens 80"),  # half of the tokens
        ({"max_tokens": 77}, [1] * 8 + [4, 4], "--max_tokens 77"),
        ({"epochs": 1.0}, [1] * 10 + [4, 4, 4], "--epochs 1"),
        ({"epochs": 1.0, "max_steps": 12}, [1] * 6 + [4, 4, 4, 4], "--epochs 1"),  # half of the steps come first
        ({}, [1] * 10 + [4, 4, 4], "--epochs 1"),
    ],
)
def test_shares_are_those_of_the_limit_that_comes_first(limits, sizes, by):
    found = budget({"0.5": 20, "0": 5}, **limits)  # YAML and the command line bring strings, in any order
    assert sizes_of(found) == sizes and found.steps_by == by
    assert found.progress(len(sizes), 0.0) == 1 > found.progress(len(sizes) - 1, 0.0)


def test_a_batch_may_also_shrink_and_skip_a_size_for_which_there_is_no_step():
    assert sizes_of(budget({"0": 10, "0.5": 20, "0.51": 5}, max_steps=4)) == [2, 2, 4, 1]
    assert sizes_of(budget({"0": 10, "0.3": 20, "0.4": 5}, max_steps=4)) == [2, 2, 1, 1]


def test_the_same_limits_lay_out_the_rest_as_the_whole():
    whole, rest = (budget({"0": 5, "0.31": 15, "0.77": 25}, 60) for _ in range(2))
    for step in range(whole.max_steps):
        rest.resume(step, whole.batches.of_step(step).start)
        assert (rest.max_steps, rest.batches.samples) == (whole.max_steps, whole.batches.samples)
        for later in range(step, whole.max_steps):
            assert rest.batches.of_step(later) == whole.batches.of_step(later)
            assert rest.progress(later, 0.0) == whole.progress(later, 0.0)


def test_every_sample_is_seen_once_in_order_and_the_rate_follows_tokens(make):
    optim = OptimSettings(lr=1e-3, warmup=0.25, decay_from=0.5)
    trainer, asked = asked_of(make, optim=optim, **SIX_OF_2_TWO_OF_6)
    assert [len(part) for part in asked] == [2] * 6 + [4, 2] * 2
    assert [sample for part in asked for sample in part] == list(range(24))
    logged = [entry for entry in read_metrics(trainer.out / "metrics.jsonl") if entry["step"]]
    tokens = [TIME * samples for samples in (2, 4, 6, 8, 10, 12, 18, 24)]
    assert [entry["tokens"] for entry in logged] == tokens
    rates = [learning_rate(seen / tokens[-1], 1e-3, 0.25, 0.5, optim.final_lr_ratio) for seen in tokens]
    assert [entry["lr"] for entry in logged] == pytest.approx(rates)


def test_a_resume_before_at_and_after_a_change_is_exact(make):
    options = dict(SIX_OF_2_TWO_OF_6, save_every=1, keep=9)
    whole = make("whole", **options)
    whole.run()
    for step, samples in ((5, 10), (6, 12), (7, 18)):
        part = make.folder / f"from-{step}"
        shutil.copytree(whole.out / f"step-{step}", part / f"step-{step}")
        shutil.copy(whole.out / "metrics.jsonl", part)
        assert read_progress(part / f"step-{step}").samples == samples
        assert asked_of(make, part.name, **options, resume=True)[1][0][0] == samples
        assert not differences(part, whole.out)


def test_ranks_share_steps_of_each_size_and_resume_exactly(make, tmp_path):
    options = dict(max_steps=4, batch_tokens=GROWS, save_every=1, keep=9)

    def train(rank: int) -> None:
        ranks = Ranks.start("cpu", timeout=20.0)
        make("whole", ranks=ranks, **options).run()
        part = tmp_path / "run" / "step-1"
        ranks.on_main(lambda: shutil.copytree(tmp_path / "whole" / "step-1", part) and None)
        asked = asked_of(make, ranks=ranks, **options, resume=True)[1]
        assert asked == [[[2], [4, 5, 6], [10, 11, 12]], [[3], [7, 8, 9], [13, 14, 15]]][rank]

    assert [rank.code for rank in on_ranks(2, train, tmp_path)] == [0, 0]
    assert not [found for found in differences(tmp_path / "run", tmp_path / "whole") if "metrics" not in found]


def test_a_larger_budget_continues_with_the_next_sample(make):
    """Its first steps were larger than those of a run that had been as long from the beginning."""
    assert asked_of(make, max_steps=2, batch_tokens=GROWS)[1] == [[0, 1], [*range(2, 8)]]
    trainer, asked = asked_of(make, max_steps=6, batch_tokens=GROWS, resume=True)
    assert asked == [[8, 9], *([*range(first, first + 6)] for first in (10, 16, 22))]
    assert (trainer.progress.step, trainer.progress.samples) == (6, 28)


def test_other_sizes_are_another_run_and_one_size_is_written_as_ever(make):
    make(max_steps=2, batch_tokens=GROWS).run()
    with pytest.raises(UserError, match=r"was trained with rows = \{'0.0': 2, '0.5': 6\}, not 8; a run cannot change"):
        make(max_steps=2, resume=True).run()
    one = make("one", max_steps=2)
    one.run()
    saved = json.loads(Path(one.out, "final/training/progress.json").read_text(encoding="utf8"))
    assert "samples" not in saved and saved["run"]["rows"] == 8


def test_the_announcement_tells_the_sizes(make, capsys):
    make(**SIX_OF_2_TWO_OF_6, by_hand=set()).run()  # of a recipe they hold too
    said = capsys.readouterr().out
    sharing = "batch      2 rows until step 6, then 6 rows of 64 tokens: 1 rank, 2 micro-batches of at most 4 rows"
    assert sharing.replace("64", str(TIME)) in said
    assert f"until      8 steps (--max_tokens {24 * TIME})" in said and "takes      up to" in said
    assert "8 steps in" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["{0.1: 8192}"], "give sizes from shares of the run on, the first of them 0, below 1"),
        (["{0: 8192, 1: 16384}"], "give sizes from shares of the run on, the first of them 0, below 1"),
        (["{0: 8192, late: 16384}"], "give sizes from shares of the run on, the first of them 0, below 1"),
        (
            ["{0: 8192}", "--max_minutes", 3],
            "a share of --max_minutes is one of an unknown number of steps; give",
        ),
        (["{0: 100, 0.5: 8192}"], "less than one row of 512 tokens"),
        (["{0: 0}"], "--batch_tokens 0: must be at least 1"),
        (["{0: 2.5}"], "batch_tokens"),
        (["{}"], "give sizes from shares of the run on"),
        (["many"], "batch_tokens"),
    ],
)
def test_sizes_that_no_run_could_have_are_refused_in_one_line(given, said):
    with pytest.raises(UserError) as refused:
        read("--batch_tokens", *given)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_each_size_must_divide_among_ranks_and_fill_a_pipeline(make):
    with pytest.raises(UserError, match=r"5 rows do not divide among 2 ranks"):
        make(world=2, batch_tokens={"0": 2 * TIME, "0.5": 5 * TIME})
    sizes = {"0": 1024, "0.5": 8192}
    piped = NextTokenSettings(out="o", batch_tokens=sizes, micro_tokens=1024, dist=ShardSettings(pp=2))
    with pytest.raises(UserError, match=r"needs \d micro-batches of a pipeline, a step has 1; lower --micro_tokens"):
        check_mesh(piped, 2, LMConfig.preset("demo"))


def test_a_student_that_answers_itself_has_steps_of_one_size():
    given = ["--teacher", "t", "--ckpt", "c", "--data", "d", "--out", "o", "--batch_tokens", "{0: 512, 0.5: 1024}"]
    assert parse(settings_of("distill"), "", given).rows_by_share == {0.0: 1, 0.5: 2}
    with pytest.raises(UserError, match=r"--on_policy samples for steps of one size; give one number"):
        parse(settings_of("distill"), "", [*given, "--on_policy", "0.5"])
