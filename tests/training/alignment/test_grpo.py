"""grpo_train.py as a whole: it learns what is rewarded, stops and resumes exactly, alone and among ranks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from forked import script_on_ranks
from resident import holding
from safetensors.torch import load_file
from victim import differences, entries

import grpo_train
from dataset import PromptDataset
from LMConfig import LMConfig
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.alignment.accuracy import Accuracy
from training.alignment.batches import Experience, LeftOut
from training.alignment.policy_loss import GRPOLoss
from training.alignment.rewards import Rewards, Sample, reward
from training.alignment.rollouts import Rollouts, RolloutSettings
from training.alignment.sampler import Sampler
from training.losses import Batch
from training.parallel.ranks import Ranks
from training.run.log import read_metrics

CPU = torch.device("cpu")
SHAPE = ["--sequence_length", 48, "--max_new_tokens", 8, "--prompts", 4, "--group", 4, "--micro_tokens", 384]
SHAPE += ["--dtype", "fp32", "--device", "cpu", "--val_problems", 8, "--val_every", 2, "--data", "arithmetic:1-2"]
VARIED = ["--rewards", json.dumps({f"{__name__}:letters": 1.0, "correct": 2.0})]


@reward
def letters(sample: Sample) -> float:
    """A number that differs from text to text."""
    return len(set(sample.text)) + ord(sample.text[0]) % 7 if sample.text else 0.0


@reward
def brief(sample: Sample) -> float:
    return 1.0 if sample.ended else 0.0


def constant(samples: Sequence[Sample]) -> list[float]:
    return [0.3] * len(samples)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def train(run, pretrained, tmp_path):
    """`train(out, *options)`: grpo_train.py from the small pretrained model."""

    def train(out: str, *options: object, code: int = 0):
        done = run(grpo_train.main, "--ckpt", pretrained / "final", "--out", tmp_path / out, *SHAPE, *options)
        assert done.code == code, done.err
        return done

    return train


@pytest.fixture
def make(tokenizer: Tokenizer):
    """`make(model, rewards, **settings)`: the experience of a model, and its loss."""

    def make(model: MiniDeepSeek, rewards: dict[str, float], world: int = 1, rank: int = 0, **changes: object):
        settings = RolloutSettings(**{**dict(prompts=4, group=4, max_new_tokens=8), **changes})
        prompts = PromptDataset([("arithmetic:1-2", 1.0)], tokenizer, 40)
        ranks = Ranks(rank, world, CPU)
        sampler = Sampler(model, torch.float32)
        return Experience(Rollouts(prompts, Rewards.of(rewards), sampler, settings, ranks), 48, 8, torch.float32)

    return make


@pytest.fixture
def small(tiny_config) -> MiniDeepSeek:
    torch.manual_seed(0)
    return MiniDeepSeek(tiny_config(vocab_size=600, initializer_range=0.02, num_nextn_predict_layers=0)).eval()


def test_what_is_rewarded_becomes_likelier(train, tmp_path):
    """Ending in time: a chance of a few per cent at first, and nearly always after fifteen steps."""
    options = ["--rewards", json.dumps({f"{__name__}:brief": 1}), "--optim.lr", 3e-3, "--prompts", 8, "--group", 8]
    done = train("run", *options, "--max_steps", 15, "--val_every", 0)
    logged = entries(tmp_path / "run")
    assert logged[1]["ended"] < 0.5 < 0.9 < logged[-1]["ended"]
    assert logged[-1]["completion_length"] < logged[1]["completion_length"]
    assert "accuracy" in done.out and "wanted" in done.out  # one completion is shown with what it was worth


def test_every_measure_is_logged_and_routers_and_drafts_stay_as_they_are(train, pretrained, tmp_path):
    train("run", *VARIED, "--max_steps", 2, "--beta", 0.1, "--optim.lr", 1e-2)
    first, *steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {"val_accuracy", "val_accuracy_level_1", "val_accuracy_level_2"} <= first.keys() & steps[-1].keys()
    names = {"reward", "reward_correct", f"reward_{__name__}:letters", "completion_length", "ended", "zero_variance"}
    names |= {"clip_share", "kl", "entropy", "mismatch", "rollout_tokens_per_second", "train_tokens_per_second"}
    for entry in steps:
        assert names <= entry.keys() and entry["rollout_tokens_per_second"] > 0 < entry["train_tokens_per_second"]
        assert entry["sample"].keys() == {"question", "answer", "completion", "rewards"}
        want = entry[f"reward_{__name__}:letters"] + 2 * entry["reward_correct"]
        assert entry["reward"] == pytest.approx(want) and entry["mismatch"] < 1e-4
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[0]["entropy"] > 0

    before, after = weights(pretrained / "final"), weights(tmp_path / "run" / "final")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layers = LMConfig.from_pretrained(pretrained / "final").num_hidden_layers
    own = {name for name in before if name.startswith(f"model.layers.{layers}.") and ".shared_head.head" not in name}
    own -= {f"model.layers.{layers}.embed_tokens.weight"}
    assert own and not moved & own and not [name for name in moved if name.endswith("correction_bias")]
    assert len(moved) > len(before) / 2


@pytest.mark.parametrize("older", [False, True], ids=["tokens of completions", "an older run's positions"])
def test_tokens_are_those_of_completions_that_were_trained_on(older, train, tmp_path, monkeypatch):
    """Or, in a run that began before they were, positions with padding: it ends where it would have ended."""
    given = [*VARIED, "--max_tokens", 400, "--save_every", 1, "--keep", 99, "--val_every", 0, "--optim.decay_from", 0.2]
    labels, batch = [], Experience.batch

    def counted(self: Experience, indices: Sequence[int]) -> Batch:
        made = batch(self, indices)
        labels.append(int((made["labels"] >= 0).sum()))
        return made

    monkeypatch.setattr(Experience, "batch", counted)
    with monkeypatch.context() as patch:
        if older:
            patch.setattr(grpo_train, "Experience", lambda *options: Experience(*options[:-1], True))
        train("whole", *given)
    logged = entries(tmp_path / "whole")
    assert len(logged) > 3 and (logged[-1]["tokens"] == sum(labels)) != older
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for folder in (tmp_path / "again").iterdir():
        if folder.is_dir() and folder.name != "step-1":
            shutil.rmtree(folder)
    train("again", *given, "--resume")
    assert not differences(tmp_path / "again", tmp_path / "whole")


@pytest.mark.parametrize("options", [[], ["--mu", 2, "--beta", 0.1, "--resample", 1]], ids=["each step", "two steps"])
def test_resume_is_bit_exact(options, train, tmp_path):
    """Saved after step 3: with mu 2 in the middle of a batch of completions, whose policy exists no more."""
    given = [*VARIED, *options, "--max_steps", 5, "--save_every", 3, "--optim.lr", 1e-2]
    train("whole", *given)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "final")
    torch.rand(17)
    done = train("again", *given, "--resume")
    assert "step-3: step 3" in done.out
    assert not differences(tmp_path / "again", tmp_path / "whole")


def test_the_second_step_on_a_batch_remembers_who_made_it(train, tmp_path):
    train("run", *VARIED, "--mu", 2, "--temperature", 0.7, "--optim.lr", 1e-2, "--max_steps", 2)
    first, second = [entry for entry in read_metrics(tmp_path / "run" / "metrics.jsonl") if "clip_share" in entry][:2]
    assert first["mismatch"] < 1e-4 and first["clip_share"] == 0  # sampled at this temperature; the ratio is 1
    assert second["clip_share"] > 0  # against the policy of before the first step


def test_another_mu_is_another_run(train):
    given = [*VARIED, "--max_steps", 1, "--val_every", 0]
    train("run", *given)
    done = train("run", *given, "--mu", 2, "--resume", code=2)
    assert "for 2 steps" in done.err and "\n" not in done.err.strip()


@pytest.mark.parametrize("cut", [[], ["--dist.zero", 3, "--dist.ep", 2]], ids=str)
def test_two_ranks_train_as_one_process_does(cut, train, pretrained, tmp_path):
    """Of what they cut each has its shares, of policy and reference, and the copy that it samples from."""
    options = [*VARIED, "--max_steps", 2, "--optim.eps", 1e-3, "--optim.lr", 1e-2, "--beta", 0.1, "--mu", 2]
    options += ["--replay_routing", "true"] if cut else []
    train("one", *options)
    given = ["--ckpt", pretrained / "final", "--out", tmp_path / "two", *SHAPE, *options]
    main = holding(grpo_train.main, 2, pretrained / "final") if cut else grpo_train.main
    script_on_ranks(2, main, [*given, *cut], tmp_path)
    alone, together = entries(tmp_path / "one"), entries(tmp_path / "two")
    for name in ("reward", "completion_length", "zero_variance", "grad_norm", "total_loss", "kl", "entropy"):
        assert [e[name] for e in together[1:]] == pytest.approx([e[name] for e in alone[1:]], rel=1e-3, abs=1e-5), name
    assert [e.get("val_accuracy") for e in together] == [e.get("val_accuracy") for e in alone]
    assert [e.get("sample") for e in together] == [e.get("sample") for e in alone]


def test_groups_without_variance_give_no_gradient(train, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr("training.alignment.batches.PATIENCE", 2)  # rollouts, each for two steps
    silent = ["--rewards", json.dumps({f"{__name__}:constant": 1.0}), "--resample", 1, "--mu", 2]
    said = train("run", *silent, "--max_steps", 3).out
    assert said.count("warning    nothing to learn in 2 rollouts in a row: ") == 1
    for entry in entries(tmp_path / "run")[1:]:
        assert (entry["zero_variance"], entry["redrawn"], entry["grad_norm"], entry["total_loss"]) == (1, 1, 0, 0)
    before, after = weights(pretrained / "final"), weights(tmp_path / "run" / "final")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_is_a_function_of_seed_and_number(small, make):
    one, two = make(small, {f"{__name__}:letters": 1.0}), make(small, {f"{__name__}:letters": 1.0})
    one.prepare(0, small)
    one.prepare(1, small)
    two.prepare(1, small)
    assert all(torch.equal(value, two.rows.tensors[name]) for name, value in one.rows.tensors.items())
    two.prepare(2, small)
    assert not torch.equal(one.rows.tokens_RT, two.rows.tokens_RT)


def test_rows_without_anything_to_learn_are_left_out_and_counted(small, make):
    experience = make(small, {f"{__name__}:letters": 1.0}, prompts=8)
    experience.prepare(0, small)
    experience.rows.left_out_R[:] = LeftOut.NO
    experience.arrange()
    mismatch, tokens = GRPOLoss("grpo", 8)(small, experience.batch(range(32)))[2]["mismatch"]
    assert tokens == experience.rows.new_R.sum() and mismatch / tokens < 1e-5  # labels meet their own log-probabilities
    experience.rows.left_out_R[4:] = LeftOut.ZERO_VARIANCE  # all but one group
    experience.rows.left_out_R[3] = LeftOut.OVERLONG  # and of this one a completion that was cut
    experience.arrange()
    batch = experience.batch(range(32, 64))
    trained = (batch["labels"] >= 0).any(1)
    assert len(trained) == 16 and trained.sum() == 3 and batch["absent"][0] == 16
    lengths = experience.rows.new_R
    assert batch["absent"][1] == lengths[4:].sum() and (batch["labels"] >= 0).sum() == lengths[:3].sum()
    assert trained.tolist() == sorted(trained.tolist(), reverse=True)  # what fills a batch comes last
    everything = [experience.batch([i]) for i in range(32)]
    assert sum((batch["labels"] >= 0).sum() for batch in everything) == lengths[:3].sum()


def test_resampling_replaces_groups_without_variance_by_other_prompts(small, make):
    """A reward that only one question in two can vary in: those that cannot are asked no more."""

    settings = {f"{__name__}:only_english": 1.0}
    plain, again = make(small, settings, prompts=8), make(small, settings, prompts=8, resample=3)
    entry, more = plain.prepare(0, small), again.prepare(0, small)
    assert entry["zero_variance"] == more["zero_variance"] > 0.5 and entry["redrawn"] == 0 < more["redrawn"]
    assert (again.rows.left_out_R == 0).sum() > (plain.rows.left_out_R == 0).sum()
    assert (plain.rows.left_out_R == LeftOut.ZERO_VARIANCE).any()  # not overlong: they stay in DAPO's denominator
    kept = plain.rows.left_out_R == LeftOut.NO
    assert torch.equal(plain.rows.tokens_RT[kept], again.rows.tokens_RT[kept])


def only_english(samples: Sequence[Sample]) -> list[float]:
    return [float(i) if sample.problem.language == "en" else 0.0 for i, sample in enumerate(samples)]


def test_completions_that_never_end_are_cut_counted_and_may_be_filtered(small, make):
    with torch.no_grad():
        small.lm_head.weight[2] = 0
        small.lm_head.weight[50] *= 50
    kept = make(small, {f"{__name__}:letters": 1.0})
    filtered = make(small, {f"{__name__}:letters": 1.0}, overlong="filter")
    for experience in (kept, filtered):
        entry = experience.prepare(0, small)
        assert entry["ended"] < 0.2 and entry["completion_length"] > 7
    assert (kept.rows.left_out_R < 2).all() and (filtered.rows.left_out_R == 2).float().mean() > 0.8
    assert torch.equal(kept.rows.advantages_R, filtered.rows.advantages_R)


def test_accuracy_counts_right_answers_by_kind(small, tokenizer, monkeypatch):
    prompts = PromptDataset([("arithmetic:1-2", 1.0)], tokenizer, 40, val_problems=10)
    answers = {problem.question: problem.answer for problem in prompts.validation if problem.kind == "level 1"}
    accuracy = Accuracy(prompts, Sampler(small, torch.float32), 8, 1.0, rows=3)

    def known(self, policy, part, samples: int, *_: object) -> list[str]:
        """Level 1 is known, of sampled answers every second one."""
        texts = [answers.get(problem.question, "-1") for _, problem in part for _ in range(samples)]
        return [text if number % 2 or samples == 1 else "-1" for number, text in enumerate(texts)]

    monkeypatch.setattr(Accuracy, "_answers", known)
    assert accuracy(small, torch.float32, Ranks(0, 1, CPU)) == {
        "val_accuracy": 0.5, "val_accuracy_level_1": 1.0, "val_accuracy_level_2": 0.0,
        "val_pass_1": 0.25, "val_pass_1_level_1": 0.5, "val_pass_1_level_2": 0.0,
    }  # fmt: skip


def test_a_budget_of_tokens_is_spent_by_completions_as_long_as_they_are(train, tmp_path):
    done = train("run", *VARIED, "--max_tokens", 2000, "--val_every", 0, "--optim.decay_from", 0.2)
    log = [entry for entry in read_metrics(tmp_path / "run" / "metrics.jsonl") if entry["step"]]
    assert log[-2]["tokens"] < 2000 <= log[-1]["tokens"] and "until      2,000 tokens" in done.out
    assert log[1]["lr"] == 1e-5 > 5 * log[-1]["lr"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--group", 1], "--group 1: a completion is compared with its group"),
        (["--temperature", 0], "--temperature 0.0: must be above 0"),
        (["--max_new_tokens", 48], "--max_new_tokens 48: leaves no room for a prompt"),
        (["--loss", "gspo"], "--loss gspo: one of grpo, dapo, dr_grpo"),
        (["--overlong", "drop"], "--overlong drop: one of keep, filter"),
        (["--mu", 0], "--mu 0: must be at least 1"),
        (["--resample", -1], "--resample -1: must be at least 0"),
        (["--rewards", "{}"], "rewards: none given"),
        (["--rewards", '{"corect": 1}'], "reward 'corect': not one of correct"),
        (["--data", "no.jsonl"], "no.jsonl: no such file"),
        (["--data", "arithmetic:9"], "levels 1 to 4"),
        (["--max_new_tokens", 40], "a prompt of level 1 has .* tokens, but 8 is the most"),
        (["--batch_tokens", 4096], "--batch_tokens 4096: a step .* --prompts x --group completions, now 4 x 4;"),
        (["--compile"], "--compile: the batches of this stage change their shape"),
        (["--beta", 0.1, "--reference", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_one_clear_line(options, what, train):
    done = train("run", "--max_steps", 1, *options, code=2)
    assert re.search(what, done.err) and done.err.count("\n") == 1
