"""lora_sft.py from end to end: what it trains, saves, takes up again and merges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call_main
from forked import on_ranks, script_on_ranks
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

import lora_sft
from errors import UserError
from eval.answering import Answerer
from eval.chat import chat
from model import MiniDeepSeek
from training.adapters.adapter import CONFIG, WEIGHTS
from training.adapters.merging import open_adapted
from training.run.log import read_metrics
from training.startup import open_checkpoint
from world import greeting_messages

ROOT = Path(__file__).resolve().parents[3]
SHAPE = ["--sequence_length", "128", "--batch_tokens", "512", "--micro_tokens", "256", "--dtype", "fp32",
         "--device", "cpu", "--log_every", "1", "--val_tokens", "512"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("messages")
    greeting_messages.generate(folder)
    return folder


@pytest.fixture
def tune(run, pretrained, data):
    """`tune(out, *options)`: lora_sft.py on the greeting messages from the small pretrained model."""

    def tune(out: Path, *options: object):
        given = ["--ckpt", pretrained / "final", "--data", data / "train.json", "--out", out, *SHAPE]
        return run(lora_sft.main, *given, *options)

    return tune


def test_an_adapter_learns_and_its_base_stays_as_it_was(tune, pretrained, tmp_path, capsys):
    before = (pretrained / "final" / "model.safetensors").read_bytes()
    done = tune(tmp_path, "--max_steps", 25, "--optim.lr", 5e-3, "--lora.targets", "all", "--merge")
    assert done.code == 0, done.err
    assert "parameters train: all, r 8" in done.out and f"merged: {tmp_path / 'merged'}" in done.out
    assert (pretrained / "final" / "model.safetensors").read_bytes() == before
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert entries[-1]["val_bits_per_byte"] < 0.9 * entries[0]["val_bits_per_byte"]
    files = {path.name for path in (tmp_path / "final").iterdir()}
    assert files == {CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json", "training"}

    base, _ = open_checkpoint(str(pretrained / "final"))
    merged, _ = open_checkpoint(str(tmp_path / "merged"))
    adapted, _ = open_adapted(str(pretrained / "final"), str(tmp_path / "final"))
    replies = []
    for options in ({"ckpt": pretrained / "final", "lora": tmp_path / "final"}, {"ckpt": tmp_path / "merged"}):
        places = {name: str(folder) for name, folder in options.items()}
        chat(**places, once="你好", temperature=0.0, max_new_tokens=16, device="cpu", dtype="fp32")
        replies.append(capsys.readouterr().out)
    assert replies[0] == replies[1] and replies[0].strip()
    moved = {name for name, value in merged.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    assert moved and all("_proj" in name and name.startswith("model.layers.") for name in moved)
    for name, value in adapted.state_dict().items():
        assert torch.equal(value, merged.state_dict()[name])


def test_peft_opens_the_adapter_and_its_base_from_any_folder(tune, pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(pretrained)
    assert tune(tmp_path / "lora", "--ckpt", "final", "--max_steps", 1).code == 0
    folder = tmp_path / "lora" / "final"
    monkeypatch.chdir(tmp_path)
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    ids = torch.arange(20, 40)[None]
    ours, _ = open_adapted(str(pretrained / "final"), str(folder))
    torch.testing.assert_close(theirs(ids).logits.float(), ours.eval()(ids).logits, rtol=1e-4, atol=2e-5)


def test_an_adapter_opens_whatever_name_it_gives_its_base(tune, pretrained, tmp_path):
    """A relative path, as adapters gave before, or one that is no longer there."""
    assert tune(tmp_path, "--max_steps", 1).code == 0
    config = tmp_path / "final" / CONFIG
    values = json.loads(config.read_text())
    for name in ("out/sft/final", "/nowhere", None):
        config.write_text(json.dumps({**values, "base_model_name_or_path": name}))
        open_adapted(str(pretrained / "final"), str(tmp_path / "final"))


@pytest.mark.parametrize("options", [[], ["--lora.targets", "all", "--base", "int8", "--gradient_checkpointing"]])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(tune, tmp_path, options):
    """Dropout too: its masks are a function of the step."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out in (whole, cut):
        assert tune(out, "--max_steps", 4, "--save_every", 2, *options).code == 0
    shutil.rmtree(cut / "final")
    done = tune(cut, "--max_steps", 4, "--save_every", 2, "--resume", *options)
    assert done.code == 0 and "resuming from" in done.out
    ours, theirs = (load_file(out / "final" / "adapter_model.safetensors") for out in (cut, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert any(value.abs().max() > 0 for name, value in ours.items() if "lora_B" in name)


def test_two_ranks_that_were_cut_go_on_to_the_same_bits(tmp_path, pretrained, data):
    """Each rank draws masks of its own, which the checkpoint of rank 0 could not hold."""
    given = ["--ckpt", pretrained / "final", "--data", data / "train.json", *SHAPE, "--micro_tokens", 128]
    given += ["--max_steps", 4, "--save_every", 2, "--lora.dropout", 0.5, "--dist.check_every", 1]

    def tune(out: Path, *options: str) -> None:
        ranks = on_ranks(2, lambda rank: call_main(lora_sft.main, *given, "--out", out, *options), tmp_path)
        assert [rank.code for rank in ranks] == [0, 0], "".join(rank.output() for rank in ranks)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tune(whole)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    tune(cut, "--resume")
    ours, theirs = (load_file(out / "final" / WEIGHTS) for out in (cut, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_recomputing_activations_changes_nothing(tune, tmp_path):
    for out, options in ((tmp_path / "kept", []), (tmp_path / "again", ["--gradient_checkpointing"])):
        assert tune(out, "--max_steps", 2, "--lora.targets", "all", *options).code == 0
    ours, theirs = (load_file(tmp_path / out / "final" / "adapter_model.safetensors") for out in ("again", "kept"))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)


def test_resuming_on_another_base_or_with_another_rank_is_refused(tune, tmp_path, pretrained):
    out = tmp_path / "run"
    assert tune(out, "--max_steps", 1).code == 0
    done = tune(out, "--max_steps", 2, "--resume", "--lora.r", 4)
    assert done.code == 2 and "does not fit" in done.err
    other = tmp_path / "other"
    shutil.copytree(pretrained / "final", other)
    model = MiniDeepSeek.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(other)
    done = tune(out, "--max_steps", 2, "--resume", "--ckpt", other)
    assert done.code == 2 and "was trained on other weights" in done.err and "--ckpt" in done.err


def test_two_ranks_train_the_adapter_of_one_process(tune, tmp_path, pretrained, data):
    one, two = tmp_path / "one", tmp_path / "two"
    # A large epsilon keeps AdamW from turning the rounding of tiny gradients into whole steps.
    options = ["--max_steps", 3, "--lora.targets", "all", "--lora.dropout", 0, "--optim.eps", 1e-3]
    options += ["--micro_tokens", 128]
    assert tune(one, *options).code == 0
    given = ["--ckpt", pretrained / "final", "--data", data / "train.json", "--out", two, *SHAPE, *options, "--merge"]
    shown = script_on_ranks(2, lora_sft.main, given, tmp_path)
    assert shown.count("merged: ") == 1 and (two / "merged" / "model.safetensors").is_file()
    ours, theirs = (load_file(out / "final" / WEIGHTS) for out in (two, one))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-6)


def test_an_adapter_is_not_taken_for_a_checkpoint(tune, tmp_path, pretrained):
    assert tune(tmp_path, "--max_steps", 1).code == 0
    with pytest.raises(UserError, match=r"is an adapter, not a model; .* --lora"):
        Answerer.open(str(tmp_path / "final"))
    with pytest.raises(UserError, match=r"no adapter_config.json in it"):
        Answerer.open(str(pretrained / "final"), lora=str(pretrained / "final"))


def test_an_adapter_for_another_tokenizer_is_refused(tune, tmp_path, pretrained):
    assert tune(tmp_path, "--max_steps", 1).code == 0
    path = tmp_path / "final" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf8"))
    merges = tokenizer["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    path.write_text(json.dumps(tokenizer), encoding="utf8")
    with pytest.raises(UserError, match="has another tokenizer than"):
        open_adapted(str(pretrained / "final"), str(tmp_path / "final"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base", "int4"], "--base int4"),
        (["--lora.targets", "head"], "--lora.targets head"),
        (["--lora.r", "0"], "--lora.r"),
        (["--lora.dora", "true", "--base", "nf4"], "DoRA reads the weights"),
    ],
)
def test_bad_settings_end_in_one_line(tune, tmp_path, options, said):
    done = tune(tmp_path / "out", "--max_steps", 1, *options)
    assert done.code == 2 and said in done.err and len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
