"""distill.py, white box: a student learns from a teacher's distributions, also on its own answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import as_options, call_main, long_lines
from forked import script_on_ranks
from victim import differences

import distill
import pretrain
from dataset import ChatDataset
from model import MiniDeepSeek
from text.order import scramble
from training.alignment.sampler import Sampler, sample_groups, uniforms
from training.distill.distillation import SAMPLED, DistillationLoss, DistillationSettings
from training.distill.on_policy import CHOICE, SAMPLING, OnPolicyChats, OnPolicySettings, prompt_of, rows_that_fit
from training.distill.teacher import open_teacher
from training.losses import IGNORE
from training.parallel.ranks import Ranks
from training.run.log import read_metrics
from training.step import PolicyDataset

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def student(pretrain_arguments, tmp_path_factory) -> Path:
    """A smaller model that was pretrained for a moment."""
    out = tmp_path_factory.mktemp("student") / "run"
    smaller = ["--model.hidden_size", 32, "--model.num_nextn_predict_layers", 0, "--max_steps", 10]
    assert call_main(pretrain.main, *pretrain_arguments, "--out", out, *smaller) == 0
    return out / "final"


@pytest.fixture
def arguments(student, pretrained, world) -> list[object]:
    given = {"ckpt": student, "teacher": pretrained / "final", "data": world / "sft.jsonl", "sequence_length": 96}
    given |= {"batch_tokens": 960, "micro_tokens": 480, "dtype": "fp32", "log_every": 1, "val_tokens": 960}
    given |= {"max_new_tokens": 12, "optim.lr": 3e-3, "val_fraction": 0}
    return as_options(given)


def entries(out: Path) -> list[dict]:
    return [entry for entry in read_metrics(out / "metrics.jsonl") if entry["step"]]


def test_a_student_comes_nearer_to_its_teacher(arguments, student, pretrained, world, tokenizer, run, tmp_path):
    done = run(distill.main, *arguments, "--out", tmp_path / "run", "--max_steps", 12)
    assert done.code == 0, done.err
    assert done.out.index("(--max_steps 12), too few to learn") < done.out.index("step      1")
    assert not long_lines(done.out, tmp_path, student.parent)
    for entry in entries(tmp_path / "run"):
        mixture = 0.5 * entry["divergence"] + 0.5 * entry["cross_entropy"]
        assert entry["loss"] == pytest.approx(mixture, rel=1e-4)
    teacher = open_teacher(str(pretrained / "final"), tokenizer, 600, torch.float32, CPU)
    measure = DistillationLoss(mtp=False, settings=DistillationSettings(), teacher=teacher)
    batch = chat_data(world, tokenizer).batch(range(8))
    with torch.no_grad():
        before, after = (
            measure(MiniDeepSeek.from_pretrained(folder), batch)[2]["divergence"]
            for folder in (student, tmp_path / "run" / "final")
        )
    assert after < 0.9 * before


def test_what_was_asked_once_trains_like_what_is_asked_at_every_step(arguments, world, run, tmp_path):
    rows = (world / "sft.jsonl").read_text(encoding="utf8").splitlines(keepends=True)[:60]
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf8")
    options = ["--data", tmp_path / "rows.jsonl", "--max_steps", 2, "--temperature", 2, "--loss", "reverse_kl"]
    assert run(distill.main, *arguments, "--out", tmp_path / "live", *options).code == 0
    done = run(distill.main, *arguments, "--out", tmp_path / "kept", *options, "--precompute_top_k", 600)
    assert done.code == 0 and "asking the teacher about" in done.out, done.err
    assert run(distill.main, *arguments, "--out", tmp_path / "few", *options, "--precompute_top_k", 16).code == 0
    live, kept, few = ([e["divergence"] for e in entries(tmp_path / name)] for name in ("live", "kept", "few"))
    assert kept == pytest.approx(live, rel=2e-3) and 0.2 * live[0] < few[0] < live[0]
    # What is there is not asked again, not even by another run of the folder.
    more = [*options, "--precompute_top_k", 600, "--max_steps", 3, "--resume"]
    done = run(distill.main, *arguments, "--out", tmp_path / "kept", *more)
    assert done.code == 0 and "asking the teacher" not in done.out


def chat_data(world, tokenizer, length: int = 96) -> ChatDataset:
    return ChatDataset([world / "sft.jsonl"], tokenizer, length, seed=5, progress=False)


def own(chats, student, share: float = 1.0, rows: int = 4, new: int = 12) -> OnPolicyChats:
    model = MiniDeepSeek.from_pretrained(student)
    settings = OnPolicySettings(on_policy=share, max_new_tokens=new, rollout_rows=16)
    return OnPolicyChats(chats, Sampler(model, torch.float32), settings, rows, 2, Ranks(0, 1, CPU))


def test_a_share_of_the_steps_is_on_policy_a_function_of_the_seed_and_others_have_the_datas_answers(
    world, tokenizer, student
):
    chats = chat_data(world, tokenizer)
    for share in (0.0, 0.3, 1.0):
        data = own(chats, student, share=share)
        assert isinstance(data, PolicyDataset)
        chosen = [data.is_on_policy(step) for step in range(2000)]
        assert np.mean(chosen) == pytest.approx(share, abs=0.04)
    data = own(chats, student, share=0.0)
    assert data.prepare(3, data.sampler.source) == {"on_policy": 0}
    batch = data.batch([12, 13])
    assert SAMPLED not in batch
    for name, value in chats.batch([12, 13]).items():
        assert torch.equal(batch[name], value)


def test_answers_are_the_students_samples_after_the_datas_prompts(world, tokenizer, student):
    chats = chat_data(world, tokenizer)
    ids, mask = np.arange(10), np.array([0, 0, 1, 1, 0, 0, 1, 1, 1, 1], np.uint8)
    assert prompt_of(ids, mask).tolist() == [0, 1, 2, 3, 4, 5]  # up to where the last answer begins
    data = own(chats, student)
    entry = data.prepare(7, data.sampler.source)
    batch = data.batch(range(28, 32))
    assert batch[SAMPLED] == 1 and batch["input_ids"].shape == (4, 96)
    members = [int(m) for row in range(28, 32) for m in chats.members(row)]
    prompts = [prompt_of(*chats.chats[member]).tolist() for member in members]
    found = 0
    for row in range(4):
        for segment in range(int(batch["segment_ids"][row].max()) + 1):
            here = batch["segment_ids"][row] == segment
            ids, labels = batch["input_ids"][row][here].tolist(), batch["labels"][row][here]
            begin = int((labels != IGNORE).nonzero()[0]) + 1
            assert (labels[begin - 1 :] != IGNORE).all() and ids[begin:] == labels[begin - 1 : -1].tolist()
            place = prompts.index(ids[:begin])
            drawn = uniforms([(5, SAMPLING, 7, place)], 1, 12)
            (made,) = sample_groups(data.sampler.source, [prompts[place]], drawn, 2)
            length = min(int(made.lengths[0]), 96 + 1 - begin)  # it ends where its row does
            same = prompts.count(prompts[place]) > 1  # of equal prompts each has its own uniforms
            assert same or labels[begin - 1 :].tolist() == made.tokens[0, :length].tolist()
            found += 1
    assert found == round((1 - entry["left_out"]) * len(members)) > 4
    assert 0 < entry["completion_length"] <= 12 and entry["on_policy"] == 1


def test_answers_end_where_their_row_does(world, tokenizer, student):
    """A student that does not stop, and prompts that leave it less than it may say."""
    chats = chat_data(world, tokenizer, 48)
    data = own(chats, student, new=90)
    entry = data.prepare(1, data.sampler.source)
    batch = data.batch(range(4, 8))
    assert entry["ended"] < 1 and 15 < entry["completion_length"] < 48
    assert batch["input_ids"].shape == (4, 48)
    assert max(int((row >= 0).sum()) for row in batch["segment_ids"]) == 48


def test_answers_that_do_not_fit_leave_out_the_last_conversations():
    conversations = [(np.zeros(size + 1), None) for size in (6, 6, 6, 4, 4, 4)]
    assert rows_that_fit(conversations, 10, 3) == ([[0, 5], [1, 4], [2, 3]], 6)
    rows, kept = rows_that_fit(conversations, 10, 2)
    assert kept == 2 and sorted(member for row in rows for member in row) == [0, 1]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(arguments, run, tmp_path):
    def chosen(seed: int) -> list[bool]:
        return [scramble(seed, CHOICE, step) < 0.5 * 2**64 for step in range(6)]

    # Steps of both kinds on both sides of the break.
    seed = next(seed for seed in range(99) if all(0 < sum(half) < 3 for half in (chosen(seed)[:3], chosen(seed)[3:])))
    own_steps = ["--on_policy", 0.5, "--seed", seed]
    whole = [*arguments, *own_steps, "--max_steps", 6, "--save_every", 3, "--keep", 5]
    assert run(distill.main, *whole, "--out", tmp_path / "whole").code == 0
    assert [bool(e["on_policy"]) for e in entries(tmp_path / "whole")] == chosen(seed)
    shutil.copytree(tmp_path / "whole", tmp_path / "part", ignore=shutil.ignore_patterns("final"))
    done = run(distill.main, *whole, "--out", tmp_path / "part", "--resume")
    assert done.code == 0, done.err
    assert not differences(tmp_path / "part", tmp_path / "whole")


def test_two_ranks_learn_from_own_answers_as_one_does(arguments, pretrained, student, run, tmp_path):
    """The student has an MTP chain, which takes no part in the steps on its own answers; DDP must not wait for it."""
    given = [*arguments, "--ckpt", pretrained / "final", "--teacher", student, "--on_policy", 0.5, "--max_steps", 4]
    given += ["--mtp_weight", 0.3, "--optim.eps", 1e-3, "--seed", 1]
    assert run(distill.main, *given, "--out", tmp_path / "one").code == 0
    script_on_ranks(2, distill.main, [*given, "--out", tmp_path / "two"], tmp_path)
    one, two = entries(tmp_path / "one"), entries(tmp_path / "two")
    assert {entry["on_policy"] for entry in one} == {0, 1}
    for name in ("divergence", "cross_entropy", "mtp_loss", "grad_norm", "on_policy", "labels"):
        assert [entry[name] for entry in two] == pytest.approx([entry[name] for entry in one], rel=1e-3), name


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--loss", "kl"], "--loss kl: one of forward_kl, reverse_kl, skewed_forward_kl"),
        (["--temperature", 0], "--temperature 0: must be above 0"),
        (["--skew", 1], "--skew 1: must be at least 0 and below 1"),
        (["--beta", 0], "--beta 0: must be between 0 and 1"),
        (["--ce_weight", 1.5], "--ce_weight 1.5: a share, from 0 to 1"),
        (["--on_policy", 2], "--on_policy 2: a share of the steps"),
        (["--sample_temperature", -1], "--sample_temperature -1: must be at least 0"),
        (["--max_new_tokens", 0], "--max_new_tokens 0: must be at least 1"),
        (["--precompute_top_k", -1], "--precompute_top_k -1: must be at least 0"),
        (["--precompute_top_k", 8, "--on_policy", 0.5], "--precompute_top_k: the student's answers are not known"),
        (["--teacher", ROOT / "nowhere"], "nowhere: no such folder; check the path"),
    ],
)
def test_what_makes_no_sense_is_one_line(options, what, arguments, run, tmp_path):
    done = run(distill.main, *arguments, "--out", tmp_path / "run", *options)
    assert done.code == 2 and done.err.startswith("error: ") and what in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_new_student_is_balanced_as_the_demos_pretraining_is(pretrained):
    given = dict(out="o", data="d", teacher=str(pretrained / "final"))
    demo = yaml.safe_load((ROOT.parent / "configs" / "demo" / "pretrain.yaml").read_text(encoding="utf8"))
    new = distill.DistillSettings(**given, student={"preset": "demo"})
    assert new.schedules["bias_speed"] == demo["bias_speed"]
    assert distill.DistillSettings(**given, ckpt="c").schedules["bias_speed"] == 0.001
    assert distill.DistillSettings(**given, student={"preset": "demo"}, bias_speed=0.002).bias_speed == 0.002
