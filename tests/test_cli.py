"""YAML and the command line: which wins, names of other programs and slips in one line, nothing taken silently."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
from demo_settings import STAGES, DemoSettings, read, settings_of, write_yaml

import dataset
import pretrain
import train_tokenizer
from cli import ELSEWHERE, _parser, call, parse
from errors import UserError, command_line
from eval.chat import chat
from eval.perplexity import perplexity
from text.files import read_yaml
from training.settings import save_resolved


def test_the_command_line_wins_over_the_file(tmp_path):
    path = write_yaml(tmp_path, seed=5, batch_tokens=4096, optim={"lr": 0.5, "clip": 2.0}, model={"preset": "26m"})
    settings = read("--config", path, "--seed", 7, "--optim.lr", 0.25, "--model.num_hidden_layers", 3)
    assert (settings.seed, settings.batch_tokens, settings.optim.lr, settings.optim.clip) == (7, 4096, 0.25, 2.0)
    assert settings.model == {"preset": "26m", "num_hidden_layers": 3}


def test_ctrl_c_while_a_script_imports_is_one_line():
    done = subprocess.run([sys.executable, "-c", "import cli; raise KeyboardInterrupt"], capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("interrupted\n", -signal.SIGINT)
    done = subprocess.run([sys.executable, "-c", "import cli; 1 / 0"], capture_output=True, text=True)
    assert "ZeroDivisionError" in done.stderr and done.returncode == 1


def test_the_home_folder_is_found_wherever_a_path_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    path = write_yaml(tmp_path, out="~/run", datasets="~/names.yaml", wandb="a~/b", model={"preset": "26m"})
    settings = parse(DemoSettings, "", ["--config", str(path)])
    assert (settings.out, settings.datasets, settings.wandb) == ("/h/run", "/h/names.yaml", "a~/b")
    assert read_yaml(write_yaml(tmp_path, suite={"data": ["~/x", "y"]})) == {"suite": {"data": ["/h/x", "y"]}}
    given = ["--config", "~/run.yaml", "--out=~/o", "--data", "a.csv=2,~/b.csv=1", "~", "--x", "~b/c", "a/~/b", "1~/2"]
    monkeypatch.setattr("sys.argv", ["x.py", *given])
    command_line(lambda: None)
    expected = ["/h/run.yaml", "--out=/h/o", "--data", "a.csv=2,/h/b.csv=1", "/h", "--x", "~b/c", "a/~/b", "1~/2"]
    assert sys.argv == ["x.py", "--config", *expected]


def test_a_flag_needs_no_value():
    settings = read("--resume", "--seed", 3)
    assert settings.resume is True and settings.seed == 3
    given = ["--ckpt", "c", "--data", "d", "--out", "o", "--lora.dora", "--merge", "--lora.r", "4"]
    settings = parse(settings_of("lora_sft"), "", given)
    assert settings.lora.dora and settings.merge and settings.lora.r == 4 and not settings.lora.rslora


@pytest.mark.parametrize(
    ("given", "value"),
    [(["--compile", "null"], None), (["--compile=null"], None), (["--compile", "false"], False), (["--compile"], True)],
)
def test_a_default_of_a_flag_can_be_typed_as_help_shows_it(given, value):
    assert read(*given, "--seed", 3).compile is value


def test_what_a_run_used_can_be_used_again(tmp_path):
    settings = read("--optim.lr", 0.25, "--mtp_weight", "{0: 0.3, 0.5: 0.1}", "--model.preset", "demo", "--resume")
    save_resolved(settings, tmp_path / "config.yaml")
    assert asdict(parse(DemoSettings, "", ["--config", str(tmp_path / "config.yaml")])) == asdict(settings)


def test_a_function_is_called_with_the_command_line():
    seen = {}

    def function(ckpt: str, json: bool = False, window: int = 0) -> None:
        """Do it.

        Args:
            ckpt: folder
            json: as JSON
            window: tokens
        """
        seen.update(ckpt=ckpt, json=json, window=window)

    call(function, "", ["--ckpt", "c", "--json", "--window", "8"])
    assert seen == {"ckpt": "c", "json": True, "window": 8}
    with pytest.raises(UserError, match="ckpt"):
        call(function, "", ["--window", "8"])


def refused(script: str, *arguments: str) -> str:
    with pytest.raises(UserError) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [script])
        parse(settings_of(script.removesuffix(".py")), "", list(arguments))
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("script", "given", "here"),
    [
        ("full_sft.py", "--learning_rate", "--optim.lr"),
        ("full_sft.py", "-lr", "--optim.lr"),
        ("full_sft.py", "--learning-rate", "--optim.lr"),
        ("full_sft.py", "--epoch", "--epochs"),
        ("full_sft.py", "--model_name_or_path", "--ckpt"),
        ("full_sft.py", "--weight_decay", "--optim.weight_decay"),
        ("full_sft.py", "--max-steps", "--max_steps"),
        ("full_sft.py", "--batch_size", "--batch_tokens"),
        ("full_sft.py", "--fp16", "--dtype"),
        ("lora_sft.py", "--lora_rank", "--lora.r"),
        ("dpo_train.py", "--beta", "--preference.beta"),
        ("grpo_train.py", "--num_generations", "--group"),
        ("grpo_train.py", "--batch_size", "--group"),
        ("grpo_train.py", "--gradient_accumulation_steps", "--prompts"),
        ("distill.py", "--gradient_accumulation_steps", "--batch_tokens"),
        ("pretrain.py", "--n_layers", "--model.num_hidden_layers"),
        ("full_sft.py", "--epochz", "--epochs"),
        ("full_sft.py", "--warmupp", "--optim.warmup"),
        ("full_sft.py", "--sequence", "--sequence_length"),
    ],
)
def test_a_name_from_elsewhere_or_a_slip_gets_the_one_here(script, given, here):
    assert refused(script, given, "1") == f"{script}: there is no {given} here; did you mean {here}?"
    assert refused(script, f"{given}=1") == f"{script}: there is no {given} here; did you mean {here}?"


def test_all_of_a_command_line_is_reported_at_once():
    said = refused("full_sft.py", "--lr", "1", "--xyzzy", "2", "--out", "o")
    assert said == "full_sft.py: there is no --lr here; did you mean --optim.lr?; there is no --xyzzy here; see --help"


def test_a_group_of_options_takes_no_value_of_its_own():
    said = refused("full_sft.py", "--optim", "adamw_torch")
    assert said.startswith("full_sft.py: --optim adamw_torch: --optim is a group of options: --optim.adamw_lr_ratio, ")


def test_a_recipe_of_another_program_gets_the_names_here(tmp_path):
    file = write_yaml(tmp_path, model_name_or_path="m", optim={"learning_rate": 1, "clip": 2}, seed=1)
    said = refused("full_sft.py", "--config", str(file))
    assert f"{file}: there is no model_name_or_path here; did you mean ckpt?" in said
    assert f"{file}: there is no optim.learning_rate here; did you mean optim.lr?" in said
    assert said.count("there is no ") == 2


@pytest.mark.parametrize("content", ["optim:\n  lrr: 1.0\n", "sequence_lenght: 3\n", "seed: [1\n", "- 1\n", "seed:\n"])
def test_a_wrong_line_in_a_recipe_is_one_line(content, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="utf8")
    with pytest.raises(UserError) as caught:
        read("--config", path)
    assert "\n" not in str(caught.value)


def test_values_that_look_like_options_and_fields_of_a_free_table_are_left_alone():
    given = ["--data", "d", "--tokenizer", "t", "--out", "o", "--model.preset", "demo", "--seed", "1"]
    assert parse(pretrain.PretrainSettings, "", given).model == {"preset": "demo"}
    asked = []

    def ask(once: str, temperature: float = 1.0) -> None:
        asked.append((once, temperature))

    call(ask, "", ["--once", "--lr is what?", "--temperature", "-1"])
    assert asked == [("--lr is what?", -1.0)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (dataset.main, ["check", "x", "--tok", "t"], "dataset.py: there is no --tok here; did you mean --tokenizer?"),
        (dataset.main, ["check", "x", "--model", "t"], "dataset.py: there is no --model here; did you mean --ckpt?"),
        (dataset.main, ["chek"], "dataset.py: there is no chek here; give one of preview, check, judge"),
        (dataset.main, [], "dataset.py: a command is missing; give one of preview, check, judge"),
        (
            lambda: call(chat, ""),
            ["--max_tokens", 3],
            "test_cli.py: there is no --max_tokens here; did you mean --max_new_tokens?",
        ),
        (
            lambda: call(train_tokenizer.train_tokenizer, ""),
            ["--vocab", 300, "--data", "x", "--out", "y"],
            "test_cli.py: there is no --vocab here; did you mean --vocab_size?",
        ),
    ],
)
def test_every_script_says_so_in_one_line(main, arguments, said, run):
    done = run(main, *arguments)
    assert (done.code, done.out, done.err) == (2, "", f"error: {said}\n")


def test_the_commands_of_dataset_have_their_help(run):
    shown = run(dataset.main, "--help")
    assert shown.code == 0 and all(
        re.search(rf"^  {name} +\w", shown.out, re.M) for name in ("preview", "check", "judge")
    )
    shown = run(dataset.main, "judge", "--help")
    assert shown.code == 0 and shown.out.startswith("usage: dataset.py judge ") and "--json" in shown.out


@pytest.mark.parametrize("script", STAGES)
def test_every_option_of_a_stage_says_what_it_is(script):
    """A docstring with two of them in a line leaves the second without help."""
    parser = _parser("")
    parser.add_class_arguments(settings_of(script))
    silent = [action.dest for action in parser._actions if action.help is None or not re.search(r"\w", action.help)]
    assert len(parser._actions) > 50 and not silent


def test_the_table_names_options_that_there_are():
    known = {"suite", "dist"}
    for script in STAGES:
        parser = _parser("")
        parser.add_class_arguments(settings_of(script))
        known |= {name.lstrip("-") for name in parser._option_string_actions}
    for function in (chat, perplexity, train_tokenizer.train_tokenizer):
        parser = _parser("")
        parser.add_function_arguments(function)
        known |= {name.lstrip("-") for name in parser._option_string_actions}
    assert {name for name in ELSEWHERE if not name.startswith("model.")} <= known
