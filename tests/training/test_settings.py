"""Settings come from YAML and the command line, and what a run used can be used again."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from conftest import as_options
from demo_settings import STAGES, read, settings_of, write_yaml

from cli import parse
from errors import UserError
from pretrain import PretrainSettings
from training.settings import model_config
from training.startup import new_model

ROOT = Path(__file__).resolve().parents[2]


def test_defaults_are_deepseek_v3s_optimiser():
    settings = read()
    assert (settings.optim.betas, settings.optim.weight_decay, settings.optim.clip) == ((0.9, 0.95), 0.1, 1.0)
    assert settings.resume is False


@pytest.mark.parametrize("stage", STAGES)
def test_the_types_of_settings_are_those_that_python_3_10_evaluates(stage):
    """There a bare ClassVar or Final raises a TypeError as soon as the command line is read."""
    annotations = [
        text for kind in settings_of(stage).__mro__ for text in vars(kind).get("__annotations__", {}).values()
    ]
    assert annotations and not [text for text in annotations if re.search(r"\b(ClassVar|Final)\b(?!\[)", text)]


@pytest.mark.parametrize("name", ["mtp_weight", "balance_weight", "bias_speed"])
def test_a_weight_can_change_along_the_run(name, tmp_path):
    path = write_yaml(tmp_path, **{name: {0: 0.3, 0.68: 0.1}})
    by_file, by_line = read("--config", path), read(f"--{name}", "{0: 0.3, 0.68: 0.1}")
    for settings in (by_file, by_line):
        assert {float(share): value for share, value in getattr(settings, name).items()} == {0.0: 0.3, 0.68: 0.1}


# What a recipe says tells whose it is; one that says none of it is fine-tuning's.
SCRIPTS = {
    "model": "pretrain", "preference": "dpo_train", "lora": "lora_sft", "samples": "distill", "rewards": "grpo_train",
    "phases": "pretrain",
}  # fmt: skip
# Those of eval are suites; those of paper are changes of its base, see test_paper.py.
RECIPES = sorted(file for file in (ROOT / "configs").rglob("*.yaml") if file.parent.name not in ("eval", "paper"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_is_valid_for_its_script(file):
    recipe = yaml.safe_load(file.read_text(encoding="utf8"))
    script = next((script for name, script in SCRIPTS.items() if name in recipe), "full_sft")
    rest = {"pretrain": ["--tokenizer", "t"], "distill": ["--teacher", "t"]}.get(script, ["--ckpt", "c"])
    settings = parse(settings_of(script), "", ["--config", str(file), "--data", "d", "--out", "o", *rest])
    if script == "pretrain":
        config = model_config(settings.model)
        assert settings.sequence_length <= config.max_position_embeddings
    if script == "grpo_train":
        assert settings.rows == settings.prompts * settings.group
    else:
        assert settings.rows >= 1 and min(settings.batch_sizes) >= settings.row_tokens


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--optim.lrr", 1], "lrr"),
        (["--sed", 1], "sed"),
        (["--max_steps", "many"], "max_steps"),
        (["--max_steps", 0], "--max_steps 0: must be positive"),
        (["--max_minutes", -1], "--max_minutes -1.0: must be positive"),
        (["--log_every", 0], "--log_every 0: must be at least 1"),
        (["--threads", -1], "--threads -1: must be at least 0"),
        (["--seed", -1], "--seed -1: give a number from 0 to 2"),
        (["--seed", 2**64], f"--seed {2**64}: give a number from 0 to 2"),
        (["--optim.lr", -1], "--optim.lr -1.0: give a number above 0"),
        (["--optim.clip", 0], "--optim.clip 0.0: give a number above 0"),
        (["--optim.eps", 0], "--optim.eps 0.0: give a number above 0"),
        (["--optim.betas", "[0.9, 1.5]"], "--optim.betas .*: give a number from 0 to below 1"),
        (["--optim.weight_decay", -1], "--optim.weight_decay -1.0: give 0 or more"),
        (["--optim.warmup", 500], "--optim.warmup 500.0: give a share of the run, from 0 to 1"),
        (["--optim.decay_from", 2000], "--optim.decay_from 2000.0: give a share of the run, from 0 to 1"),
        (["--batch_tokens", 100], "--batch_tokens 100: less than one row of 512 tokens"),
        (["--on_error", "ignore"], "--on_error ignore: one of skip, stop"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(arguments, what):
    with pytest.raises(UserError, match=what) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)


def test_fewer_than_no_processes_are_refused():
    with pytest.raises(UserError, match="--workers -1: must be at least 0"):
        PretrainSettings(data="d", out="o", workers=-1)


def test_a_preset_can_be_changed_field_by_field():
    config = model_config({"preset": "26m", "num_hidden_layers": 3, "vocab_size": 7})
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (384, 3, 7)


def test_a_new_model_knows_the_tokenizers_tokens_and_more_where_asked(tokenizer_folder):
    sizes = {"preset": "demo", "num_hidden_layers": 2}
    assert new_model(sizes, str(tokenizer_folder))[0].config.vocab_size == 600
    assert new_model({**sizes, "vocab_size": 640}, str(tokenizer_folder))[0].config.vocab_size == 640
    for name, value in (("vocab_size", 599), ("eos_token_id", 1)):
        with pytest.raises(UserError, match=f"--model.{name} {value}: it is (600|2) in "):
            new_model({**sizes, name: value}, str(tokenizer_folder))


@pytest.mark.parametrize("script", ["pretrain", "full_sft", "dpo_train", "distill"])
def test_help_explains_every_option(script, capsys):
    kind, description = settings_of(script), import_module(script).__doc__
    with pytest.raises(SystemExit) as end:
        parse(kind, description, ["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and description.splitlines()[0] in shown
    documented = "\n".join(inspect.cleandoc(part.__doc__ or "") for part in reversed(kind.__mro__))
    explanations = dict(re.findall(r"^ {4}(\w+): (.+?)[.;]?$", documented, re.MULTILINE))
    text = " ".join(shown.split())
    for option in fields(kind):
        assert f"--{option.name}" in shown
        assert explanations[option.name] in text, f"{option.name} is not explained"


@pytest.mark.parametrize("script", STAGES)
def test_every_stage_takes_settings_within_settings_and_each_way_to_resume(script):
    kind, given = settings_of(script), {"out": "o", "data": "d", "ckpt": "c"}
    given |= {"teacher": "t"} if script == "distill" else {}
    base = as_options(given)
    settings = parse(kind, "", [*base, "--optim.lr", "0.5", "--dist.timeout", "7", "--dist.check_every", "3"])
    assert (settings.optim.lr, settings.dist.timeout, settings.dist.check_every) == (0.5, 7.0, 3)
    ways = {(): False, ("--resume",): True, ("--resume", "true"): True, ("--resume", "false"): False}
    for words, meaning in {**ways, ("--resume", "last-good"): "last-good"}.items():
        assert parse(kind, "", [*base, *words]).resume == meaning
    for wrong in ("--resume lastgood", "--dist.timeout 0", "--dist.check_every -1", "--max_skipped 0"):
        with pytest.raises(UserError):
            parse(kind, "", [*base, *wrong.split()])
