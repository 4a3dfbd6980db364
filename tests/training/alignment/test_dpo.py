"""dpo_train.py from the command line: it learns, resumes to the bit, asks its reference either way, on any ranks."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import as_options, call_main
from forked import at_scale, script_on_ranks
from resident import holding
from safetensors.torch import load_file
from victim import differences, entries

import dpo_train
from cli import parse
from dpo_train import DPOSettings, settle_length
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.parallel.ranks import Ranks
from world.cast import World
from world.chats import preference

LOGGED = {"accuracy", "margin", "chosen_log_prob", "rejected_log_prob", "kl", "nll"}


@pytest.fixture(scope="module")
def arguments(pretrained: Path, world: Path, tmp_path_factory) -> list[object]:
    """A small run on 60 pairs, all but --out: 4 rows a step in 2 micro-batches."""
    pairs, rng, town = tmp_path_factory.mktemp("pairs") / "pairs.jsonl", random.Random(0), World.build(0)
    rows = [json.dumps(preference(rng, town), ensure_ascii=False) for _ in range(60)]
    pairs.write_text("\n".join(rows), encoding="utf8")
    given = {
        "ckpt": pretrained / "final", "data": pairs, "sequence_length": 128, "batch_tokens": 1024,
        "micro_tokens": 512, "val_fraction": 0.2, "val_text": world / "heldout.txt", "val_tokens": 2048, "log_every": 1,
        "dtype": "fp32", "device": "cpu", "max_steps": 3, "optim.lr": 2e-3,
    }  # fmt: skip
    return as_options(given)


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory) -> Path:
    """A run of eight steps with checkpoints on its way."""
    out = tmp_path_factory.mktemp("dpo") / "run"
    assert call_main(dpo_train.main, *arguments, "--out", out, "--max_steps", 8, "--save_every", 3, "--keep", 9) == 0
    return out


def test_held_out_pairs_are_preferred_more_after_training(finished):
    log = entries(finished)
    assert [entry["step"] for entry in log] == list(range(9))
    assert log[1].keys() >= LOGGED and log[0].keys() >= {f"val_{name}" for name in LOGGED}
    assert log[0]["val_accuracy"] == 0.5 and log[0]["val_margin"] == 0  # it is its own reference
    assert log[0]["val_loss"] == log[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert log[-1]["val_accuracy"] > 0.75 and log[-1]["val_margin"] > 0.5 and log[-1]["val_loss"] < 0.6
    assert log[0]["val_bits_per_byte"] > 0 and "val_bits_per_byte" in log[-1]


def test_router_biases_and_the_mtp_layer_stand_still(finished, pretrained):
    before, after = (
        load_file(folder / "final" / "model.safetensors") | load_file(folder / "final" / "mtp.safetensors")
        for folder in (pretrained, finished)
    )
    still = [name for name in before if name.endswith("e_score_correction_bias") or ".layers.2." in name]
    assert any("eh_proj" in name for name in still)
    shared = ("embed_tokens", "shared_head.head")
    assert all(before[name].equal(after[name]) for name in still if not name.split(".weight")[0].endswith(shared))
    assert not before["model.layers.0.self_attn.o_proj.weight"].equal(after["model.layers.0.self_attn.o_proj.weight"])


@pytest.mark.parametrize("precompute", [True, False])
def test_a_resume_is_exact(precompute, arguments, finished, tmp_path, run):
    """From step 3 on; the reference is what training began with, not what it had become."""
    out, whole = tmp_path / "run", finished
    options = [*arguments, "--max_steps", 8, "--precompute_reference", str(precompute).lower()]
    if not precompute:
        whole, options = tmp_path / "whole", [*options, "--max_steps", 4]
        assert run(dpo_train.main, *options, "--out", whole, "--save_every", 3, "--keep", 9).code == 0
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("final", "step-6"))
    done = run(dpo_train.main, *options, "--out", out, "--resume")
    assert done.code == 0 and f"resuming from {out / 'step-3'}" in done.out
    assert not differences(out, whole)


def test_a_run_of_an_earlier_version_resumes_at_its_own_length_and_without_cut_prompts(pretrained, tmp_path, run):
    """Rows were shorter then by default, and what did not fit was dropped: neither may change midway."""
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答" * 9}] * 3
    rows = [{"prompt": f"问题{i}", "chosen": f"好{i}", "rejected": f"不{i}"} for i in range(12)]
    rows += [{"prompt": [*turns, {"role": "user", "content": "现在？"}], "chosen": "好", "rejected": "不"}]
    pairs, recipe, out = tmp_path / "pairs.jsonl", tmp_path / "old.yaml", tmp_path / "run"
    pairs.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf8")
    recipe.write_text("{sequence_length: 32, dtype: fp32, device: cpu, save_every: 2, keep: 9}", encoding="utf8")
    given = ["--config", recipe, "--ckpt", pretrained / "final", "--data", pairs, "--out", out, "--val_fraction", 0]
    given += ["--batch_tokens", 384, "--micro_tokens", 384]
    whole = settle_length
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo_train, "settle_length", lambda *given: whole(*given) and False)  # nothing was cut then
        done = run(dpo_train.main, *given, "--max_steps", 4)
        assert done.code == 0 and "1 dropped" in done.out
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "step-4", ignore_errors=True)
    recipe.write_text("{sequence_length: 48, dtype: fp32, device: cpu, save_every: 2, keep: 9}", encoding="utf8")
    done = run(dpo_train.main, *given, "--max_steps", 4, "--resume")
    assert done.code == 0 and "1 dropped" in done.out and f"resuming from {out / 'step-2'}" in done.out
    done = run(dpo_train.main, *given, "--max_steps", 1, "--out", tmp_path / "new")
    assert done.code == 0 and "dropped" not in done.out


def test_a_length_by_default_is_at_most_what_the_model_reads(tmp_path):
    alone = Ranks(0, 1, torch.device("cpu"))
    for words, length in (([], 300), (["--sequence_length", "700"], 700)):
        settings = parse(DPOSettings, "", ["--ckpt", "c", "--data", "d", "--out", str(tmp_path / "none"), *words])
        assert settings.holds("sequence_length") == bool(words) and DPOSettings.sequence_length == 1024
        assert settle_length(settings, alone, 300) and settings.sequence_length == length


def test_asking_the_reference_once_is_asking_it_at_each_step(arguments, tmp_path, run):
    logs = []
    for precompute in ("true", "false"):
        out = tmp_path / precompute
        assert run(dpo_train.main, *arguments, "--out", out, "--precompute_reference", precompute).code == 0
        assert (out / "reference.safetensors").exists() == (precompute == "true")
        logs.append(entries(out))
    for once, live in zip(*logs, strict=True):
        assert once.pop("held_out", None) == live.pop("held_out", None)
        assert once == pytest.approx(live, rel=1e-4, abs=1e-5)
    assert logs[0][-1]["margin"] > 0


def test_a_reference_of_ones_own_is_asked(arguments, finished, tmp_path, run):
    """A policy that is measured against a better one is behind from the first step on."""
    assert run(dpo_train.main, *arguments, "--out", tmp_path / "run", "--reference", finished / "final").code == 0
    first = entries(tmp_path / "run")[0]
    assert first["val_accuracy"] < 0.25 and first["val_margin"] < -0.5 and first["val_kl"] > 0


CUTS = {
    "": ([], None),
    "zero 3, ep 2": (["--dist.zero", 3, "--dist.ep", 2], 0.5),
    "live": (["--dist.zero", 1, "--precompute_reference", "false"], 1),
}
# A large epsilon keeps AdamW from turning the rounding of tiny gradients into whole steps.
STEADY = ["--optim.eps", "1e-3", "--max_steps", 2]


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert call_main(dpo_train.main, *arguments, *STEADY, "--out", out) == 0
    return out


@pytest.mark.parametrize("cut", ["", "zero 3, ep 2", *at_scale("live")])
def test_two_ranks_train_as_one_process_does(cut, arguments, alone, pretrained, tmp_path):
    """Of what they cut, neither ever holds more than its shares: of the policy, and of a reference that stays."""
    (cut, held), two = CUTS[cut], tmp_path / "two"
    main = holding(dpo_train.main, held, pretrained / "final") if held else dpo_train.main
    shown = script_on_ranks(2, main, [*arguments, *STEADY, "--out", two, *cut], tmp_path)
    assert "4 rows of 256 tokens: 2 ranks, 1 micro-batch of 2 rows" in shown
    for ours, theirs in zip(entries(two), entries(alone), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours.pop("held_out", None) == theirs.pop("held_out", None)
        for name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (name, theirs["step"])


def test_a_relative_without_a_reference_learns_the_same_pairs(arguments, tmp_path, run):
    options = ["--preference.loss", "simpo", "--preference.beta", "2", "--max_steps", 8]
    assert run(dpo_train.main, *arguments, *options, "--out", tmp_path / "run").code == 0
    log = entries(tmp_path / "run")
    assert log[-1]["val_margin"] > log[0]["val_margin"] and log[-1]["val_loss"] < log[0]["val_loss"]
    assert "kl" not in log[1]


def test_the_answers_of_another_reference_are_not_used(arguments, checkpoint, tmp_path, run):
    """A run that ended before its first checkpoint leaves the file, and is begun again with another model."""
    out, model = tmp_path / "run", MiniDeepSeek.from_pretrained(checkpoint)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(checkpoint)
    heard = []
    for options in ([], ["--resume", "true"], ["--resume", "true", "--reference", checkpoint]):
        assert run(dpo_train.main, *arguments, "--out", out, "--max_steps", 1, *options).code == 0
        heard.append(load_file(out / "reference.safetensors")["log_probs"])
        shutil.rmtree(out / "final")
    assert torch.equal(heard[0], heard[1]) and not torch.equal(heard[0], heard[2])


@pytest.fixture
def other_shape(tokenizer: Tokenizer, tiny_model, tmp_path) -> Path:
    """A checkpoint of another width, with the same tokenizer."""
    model: MiniDeepSeek = tiny_model(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save(tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--reference", "{other}"], "error: --reference {other}: its .* of the same shape"),
        (["--preference.loss", "simpo", "--reference", "{finished}/final"], "simpo has none; leave it out"),
        (["--preference.beta", 0], "error: --preference.beta 0.0: must be positive\n"),
        (["--val_text", "no.txt"], "--val_text no.txt: cannot be read"),
        (["--out", "{finished}"], r"holds a run already \(final\); add --resume"),
    ],
)
def test_what_makes_no_sense_is_one_line(options, what, arguments, other_shape, finished, tmp_path, run):
    before = (finished / "reference.safetensors").stat().st_mtime_ns
    places = {"other": other_shape, "finished": finished}
    options = [option.format(**places) if isinstance(option, str) else option for option in options]
    done = run(dpo_train.main, *arguments, "--out", tmp_path / "run", *options)
    assert done.code == 2 and re.search(what.format(**places), done.err) and done.err.count("\n") == 1
    assert (finished / "reference.safetensors").stat().st_mtime_ns == before
