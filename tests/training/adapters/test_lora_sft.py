"""lora_sft.py from end to end: what it trains, saves, resumes and merges."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import as_options, call_main, long_lines
from forked import at_scale, script_on_ranks
from resident import holding
from safetensors.torch import load_file

import lora_sft
from errors import UserError
from eval.answering import Answerer
from eval.chat import chat
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.checkpoint.card import card
from training.run.log import read_metrics
from training.startup import open_checkpoint
from world import greeting_messages

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def arguments(pretrained, tmp_path_factory) -> list[object]:
    """A small run on some greeting messages, all but --out; nothing is held out."""
    folder = tmp_path_factory.mktemp("messages")
    greeting_messages.generate(folder)
    rows = json.loads((folder / "train.json").read_text(encoding="utf8"))
    (folder / "train.json").write_text(json.dumps(rows[::10], ensure_ascii=False), encoding="utf8")
    given = {
        "ckpt": pretrained / "final", "data": folder / "train.json", "sequence_length": 128, "batch_tokens": 512,
        "micro_tokens": 256, "dtype": "fp32", "device": "cpu", "log_every": 1, "val_fraction": 0, "val_tokens": 512,
    }  # fmt: skip
    return as_options(given)


@pytest.fixture
def tune(run, arguments):
    """`tune(out, *options)`: lora_sft.py to its end."""

    def tune(out: Path, *options: object, code: int = 0):
        done = run(lora_sft.main, *arguments, "--out", out, *options)
        assert done.code == code, done.err
        return done

    return tune


@pytest.fixture(scope="module")
def tuned(arguments, tmp_path_factory) -> Path:
    """A run of one step. Tests copy what they change."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert call_main(lora_sft.main, *arguments, "--out", out, "--max_steps", 1) == 0
    return out


def open_adapted(pretrained: Path, folder: Path) -> MiniDeepSeek:
    from training.adapters.adapter import open_adapted

    return open_adapted(str(pretrained / "final"), str(folder))[0]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / WEIGHTS)


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_an_adapter_learns_and_its_base_stays_as_it_was(tune, pretrained, tmp_path, capsys):
    before = (pretrained / "final" / "model.safetensors").read_bytes()
    options = ["--max_steps", 20, "--optim.lr", 8e-3, "--val_fraction", 0.1, "--lora.targets", "all", "--merge"]
    done = tune(tmp_path, *options)
    assert "parameters train: all, r 8" in done.out
    assert f"merged: {tmp_path / 'merged'}, with the adapter of {tmp_path / 'final'}" in done.out
    assert (pretrained / "final" / "model.safetensors").read_bytes() == before
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert entries[-1]["val_bits_per_byte"] < 0.9 * entries[0]["val_bits_per_byte"]
    files = {path.name for path in (tmp_path / "final").iterdir()}
    assert files == {CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json", "training"}
    adapter, whole = (card(tmp_path / name) for name in ("final", "merged"))
    assert "library_name: peft" in adapter and "--ckpt pretrain/final --lora FOLDER" in adapter
    assert "library_name: transformers" in whole and "low-rank adapter" in whole and "20 optimiser steps" in whole

    base, merged = (
        open_checkpoint(str(folder))[0].state_dict() for folder in (pretrained / "final", tmp_path / "merged")
    )
    assert same_bits(open_adapted(pretrained, tmp_path / "final").state_dict(), merged)
    moved = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    assert moved and all("_proj" in name and name.startswith("model.layers.") for name in moved)
    replies = []
    for options in ({"ckpt": pretrained / "final", "lora": tmp_path / "final"}, {"ckpt": tmp_path / "merged"}):
        places = {name: str(folder) for name, folder in options.items()}
        chat(**places, once="你好", temperature=0.0, max_new_tokens=16, device="cpu", dtype="fp32")
        replies.append(capsys.readouterr().out)
    assert replies[0] == replies[1] and replies[0].strip()


@pytest.mark.parametrize(("rate", "worse"), [(10.0, True), (8e-3, False)])
def test_a_best_adapter_that_is_worse_than_none_is_merged_and_that_is_said(rate, worse, tune, pretrained, tmp_path):
    options = ["--max_steps", 2, "--val_every", 1, "--val_fraction", 0.1, "--keep_best", "--merge", "--optim.lr", rate]
    done = tune(tmp_path, *options)
    assert f"merged: {tmp_path / 'merged'}, with the adapter of {tmp_path / 'best'}\n" in done.out
    said = f"notice: merged all the same; on the held-out rows {pretrained / 'final'} is no worse without it"
    assert done.out.index("(--max_steps 2), too few to learn") < done.out.index("step      1")
    assert not long_lines(done.out, tmp_path, pretrained)
    assert (said in done.out) == ("no validation was better than before training" in done.out) == worse


@pytest.mark.parametrize("target", ["attention,ffn --lora.dora", "all"])
def test_in_bfloat16_the_frozen_weights_train_validate_and_write_samples_and_the_best_is_merged(
    target, tune, pretrained, tmp_path, monkeypatch
):
    monkeypatch.setattr("training.run.progress.Progress.judge", lambda progress, _: progress.step == 1)
    options = ["--max_steps", 2, "--val_every", 1, "--val_fraction", 0.1, "--dtype", "bf16", "--keep_best", "--merge"]
    options += ["--lora.targets", *target.split()]
    done = tune(tmp_path, *options)
    assert "sample " in done.out and f"with the adapter of {tmp_path / 'best'}\n" in done.out
    merged = open_checkpoint(str(tmp_path / "merged"))[0].state_dict()
    assert same_bits(open_adapted(pretrained, tmp_path / "best").state_dict(), merged)
    assert "1 optimiser steps" in card(tmp_path / "merged")
    assert not same_bits(weights(tmp_path), load_file(tmp_path / "best" / WEIGHTS))


def test_an_adapter_opens_whatever_name_it_gives_its_base(tuned, pretrained, tmp_path):
    """A relative path, as adapters gave before, or one that is no longer there."""
    folder = Path(shutil.copytree(tuned / "final", tmp_path / "adapter"))
    values = json.loads((folder / CONFIG).read_text())
    for name in ("out/sft/final", "/nowhere", None):
        (folder / CONFIG).write_text(json.dumps({**values, "base_model_name_or_path": name}))
        open_adapted(pretrained, folder)


@pytest.mark.parametrize("options", [[], ["--lora.targets", "all", "--base", "int8", "--gradient_checkpointing"]])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(tune, tmp_path, options):
    """Dropout too: its masks are a function of the step."""
    whole, cut, options = tmp_path / "whole", tmp_path / "cut", ["--max_steps", 2, "--save_every", 1, *options]
    tune(whole, *options)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    assert "resuming from" in tune(cut, *options, "--resume").out
    assert same_bits(weights(cut), weights(whole))
    assert any(value.abs().max() > 0 for name, value in weights(cut).items() if "lora_B" in name)


@pytest.mark.parametrize("shards", [["--dist.zero", 3], *at_scale([], ["--dist.pp", 2])], ids=str)
def test_two_ranks_that_were_cut_go_on_to_the_same_bits(shards, tmp_path, arguments):
    """Each rank draws masks of its own, which the checkpoint of rank 0 could not hold."""
    given = [*arguments, "--micro_tokens", 128, "--max_steps", 2, "--save_every", 1, "--lora.dropout", 0.5]
    given += ["--dist.check_every", 1, *shards]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script_on_ranks(2, lora_sft.main, [*given, "--out", whole], tmp_path)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    script_on_ranks(2, lora_sft.main, [*given, "--out", cut, "--resume"], tmp_path)
    assert same_bits(weights(cut), weights(whole))


CUTS = {"all": ["--dist.zero", 3], "attention,ffn": ["--dist.zero", 1, "--dist.ep", 2]}


@pytest.mark.parametrize("targets", ["all", *at_scale("attention,ffn")])
def test_ranks_with_shards_train_the_adapter_of_one_process(targets, tune, tmp_path, arguments, pretrained):
    """Neither ever holds more than its share of the base, and an adapter."""
    options = ["--max_steps", 2, "--lora.dropout", 0, "--optim.eps", 1e-3, "--lora.targets", targets]
    one, two = tmp_path / "one", tmp_path / "two"
    tune(one, *options)
    given = [*arguments, "--out", two, *options, *CUTS[targets], "--micro_tokens", 128]
    script_on_ranks(2, holding(lora_sft.main, 0.6, pretrained / "final"), given, tmp_path)
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-3, atol=1e-6)


def test_a_pipeline_trains_the_adapter_of_one_process(tune, tmp_path, arguments, pretrained):
    """Folded into a V, where the gradients of weights wait, if they are trained; head and embedding are one matrix."""
    base, one, two = tmp_path / "base", tmp_path / "one", tmp_path / "two"
    shutil.copytree(pretrained / "final", base, ignore=shutil.ignore_patterns("*.safetensors"))
    deeper = {"num_hidden_layers": 4, "tie_word_embeddings": True}
    MiniDeepSeek(replace(LMConfig.from_pretrained(pretrained / "final"), **deeper)).save_pretrained(base)
    options = ["--ckpt", base, "--max_steps", 2, "--lora.dropout", 0, "--optim.eps", 1e-3, "--lora.targets", "all"]
    tune(one, *options)
    given = [*arguments, "--out", two, *options, "--dist.pp", 2, "--dist.schedule", "zbv", "--micro_tokens", 128]
    script_on_ranks(2, holding(lora_sft.main, 0.8, base), given, tmp_path)
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-3, atol=1e-6)
    names = ("loss", "grad_norm")
    for ours, theirs in zip(*(read_metrics(out / "metrics.jsonl") for out in (two, one)), strict=True):
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-4)


@pytest.mark.parametrize("option", ["--lora.targets all", "--base int8"])
def test_experts_over_ranks_have_no_adapters_and_are_not_quantized(option, tune, tmp_path):
    said = tune(tmp_path / "run", *option.split(), "--dist.ep", 2, code=2).err
    assert said.splitlines()[-1].endswith(f"--dist.ep 2: does not go with {option}; give --dist.zero 3")


def test_two_ranks_and_recomputed_activations_train_the_adapter_of_one_process(tune, tmp_path, arguments):
    one, two, again = tmp_path / "one", tmp_path / "two", tmp_path / "again"
    # A large epsilon keeps AdamW from turning the rounding of tiny gradients into whole steps.
    options = ["--max_steps", 2, "--lora.targets", "all", "--lora.dropout", 0, "--optim.eps", 1e-3]
    options += ["--micro_tokens", 128]
    tune(one, *options)
    tune(again, *options, "--gradient_checkpointing")
    shown = script_on_ranks(2, lora_sft.main, [*arguments, "--out", two, *options, "--merge"], tmp_path)
    assert shown.count("merged: ") == 1 and (two / "merged" / "model.safetensors").is_file()
    for out, rtol in ((two, 1e-3), (again, 1e-4)):
        torch.testing.assert_close(weights(out), weights(one), rtol=rtol, atol=1e-6)


def test_resuming_on_another_base_or_with_another_rank_is_refused(tune, tuned, tmp_path, checkpoint):
    out = Path(shutil.copytree(tuned, tmp_path / "run"))
    assert "does not fit" in tune(out, "--max_steps", 2, "--resume", "--lora.r", 4, code=2).err
    model = MiniDeepSeek.from_pretrained(checkpoint)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(checkpoint)
    done = tune(out, "--max_steps", 2, "--resume", "--ckpt", checkpoint, code=2)
    assert "was trained on other weights" in done.err and "--ckpt" in done.err


def test_an_adapter_is_not_taken_for_a_checkpoint(tuned, pretrained):
    with pytest.raises(UserError, match=r"is an adapter, not a model; .* --lora"):
        Answerer.open(str(tuned / "final"))
    with pytest.raises(UserError, match=r"no adapter_config.json in it"):
        Answerer.open(str(pretrained / "final"), lora=str(pretrained / "final"))


def test_an_adapter_for_another_tokenizer_is_refused(tuned, tmp_path, pretrained):
    path = Path(shutil.copytree(tuned / "final", tmp_path / "adapter")) / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf8"))
    merges = tokenizer["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    path.write_text(json.dumps(tokenizer), encoding="utf8")
    with pytest.raises(UserError, match="has another tokenizer than"):
        open_adapted(pretrained, path.parent)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--base", "int4"], "--base int4"),
        (["--lora.dora", "true", "--base", "nf4"], "DoRA reads the weights"),
    ],
)
def test_bad_settings_end_in_one_line(options, what, tune, tmp_path):
    done = tune(tmp_path / "out", "--max_steps", 1, *options, code=2)
    assert what in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
