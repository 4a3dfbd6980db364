"""Names that people know from elsewhere, and slips: one line with the name here, nothing taken silently."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import dataset
import dpo_train
import full_sft
import grpo_train
import lora_sft
import pretrain
import train_tokenizer
from errors import UserError
from eval.chat import chat
from eval.perplexity import perplexity
from training.flags import CALLED, INSTEAD, OWNERS
from training.settings import _parser, call, parse

STAGES = {
    "full_sft.py": full_sft.SFTSettings, "lora_sft.py": lora_sft.LoraSFTSettings, "dpo_train.py": dpo_train.DPOSettings,
    "grpo_train.py": grpo_train.GRPOSettings, "pretrain.py": pretrain.PretrainSettings,
}  # fmt: skip


def options() -> set[str]:
    """Every option of the scripts that share the parser."""
    found: set[str] = set()
    for kind in STAGES.values():
        parser = _parser("")
        parser.add_class_arguments(kind)
        found |= {name.lstrip("-") for name in parser._option_string_actions}
    for function in (chat, perplexity, train_tokenizer.train_tokenizer):
        parser = _parser("")
        parser.add_function_arguments(function)
        found |= {name.lstrip("-") for name in parser._option_string_actions}
    return found


def refused(script: str, *arguments: str) -> str:
    with pytest.raises(UserError) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [script])
        parse(STAGES[script], "", list(arguments))
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("script", "given", "here"),
    [
        ("full_sft.py", "--learning_rate", "--optim.lr"),
        ("full_sft.py", "--lr", "--optim.lr"),
        ("full_sft.py", "-lr", "--optim.lr"),
        ("full_sft.py", "--learning-rate", "--optim.lr"),
        ("full_sft.py", "--epoch", "--epochs"),
        ("full_sft.py", "--num_train_epochs", "--epochs"),
        ("full_sft.py", "--num_epochs", "--epochs"),
        ("full_sft.py", "--max_length", "--sequence_length"),
        ("full_sft.py", "--max_seq_len", "--sequence_length"),
        ("full_sft.py", "--model_name_or_path", "--ckpt"),
        ("full_sft.py", "--model", "--ckpt"),
        ("full_sft.py", "--output_dir", "--out"),
        ("full_sft.py", "--dataset", "--data"),
        ("full_sft.py", "--train_file", "--data"),
        ("full_sft.py", "--save_steps", "--save_every"),
        ("full_sft.py", "--eval_steps", "--val_every"),
        ("full_sft.py", "--logging_steps", "--log_every"),
        ("full_sft.py", "--weight_decay", "--optim.weight_decay"),
        ("full_sft.py", "--max-steps", "--max_steps"),
        ("full_sft.py", "--resume_from_checkpoint", "--resume"),
        ("lora_sft.py", "--lora_r", "--lora.r"),
        ("lora_sft.py", "--lora_rank", "--lora.r"),
        ("lora_sft.py", "--lora_alpha", "--lora.alpha"),
        ("dpo_train.py", "--beta", "--preference.beta"),
        ("grpo_train.py", "--num_generations", "--group"),
        ("grpo_train.py", "--kl_coef", "--beta"),
        ("pretrain.py", "--n_layers", "--model.num_hidden_layers"),
    ],
)
def test_a_name_from_elsewhere_gets_the_one_here(script, given, here):
    assert refused(script, given, "1") == f"{script}: {given} is called {here} here"
    assert refused(script, f"{given}=1") == f"{script}: {given} is called {here} here"


@pytest.mark.parametrize(
    ("script", "given", "named"),
    [
        ("full_sft.py", "--batch_size", ["--batch_tokens", "--micro_tokens"]),
        ("full_sft.py", "--per_device_train_batch_size", ["--micro_tokens", "--batch_tokens"]),
        ("full_sft.py", "--gradient_accumulation_steps", ["--batch_tokens", "--micro_tokens"]),
        ("full_sft.py", "--warmup_steps", ["--optim.warmup"]),
        ("full_sft.py", "--fp16", ["--dtype bf16"]),
        ("full_sft.py", "--lora_r", ["lora_sft.py has --lora.r"]),
        ("full_sft.py", "--local_rank", ["torchrun"]),
        ("grpo_train.py", "--batch_size", ["--prompts", "--group"]),
    ],
)
def test_what_there_is_none_of_gets_what_takes_its_place(script, given, named):
    said = refused(script, given)
    assert said.startswith(f"{script}: there is no {given} here: ") and all(part in said for part in named)


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ("--epochz", "; did you mean --epochs?"),
        ("--sed", "; did you mean --seed?"),
        ("--optim.lrr", "; did you mean --optim.lr?"),
        ("--warmupp", "; did you mean --optim.warmup?"),
        ("--sequence", "; did you mean --sequence_length?"),
        ("--xyzzy", "; see --help"),
    ],
)
def test_a_slip_gets_the_nearest_and_no_option_may_be_cut_short(given, end):
    assert refused("full_sft.py", given, "1") == f"full_sft.py: there is no {given} here{end}"


def test_all_of_a_command_line_is_told_at_once():
    said = refused("full_sft.py", "--lr", "1", "--epoch", "2", "--out", "o")
    assert said == "full_sft.py: --lr is called --optim.lr here; --epoch is called --epochs here"


def test_a_group_of_options_takes_no_value_of_its_own():
    said = refused("full_sft.py", "--optim", "adamw_torch")
    assert said.startswith("full_sft.py: --optim adamw_torch: --optim is a group of options: --optim.betas, ")


def test_a_recipe_of_another_program_is_told_its_names(tmp_path):
    file = tmp_path / "their.yaml"
    file.write_text(yaml.safe_dump({"model_name_or_path": "m", "optim": {"learning_rate": 1, "clip": 2}, "seed": 1}))
    said = refused("full_sft.py", "--config", str(file))
    assert f"{file}: model_name_or_path is called ckpt here" in said
    assert f"{file}: optim.learning_rate is called optim.lr here" in said and said.count("here") == 2


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
        (dataset.main, ["check", "x", "--model", "t"], "dataset.py: --model is called --ckpt here"),
        (dataset.main, ["chek"], "dataset.py: there is no chek here; give one of preview, check, judge"),
        (dataset.main, [], "dataset.py: a command is missing; give one of preview, check, judge"),
        (lambda: call(chat, ""), ["--max_tokens", 3], "test_flags.py: --max_tokens is called --max_new_tokens here"),
        (lambda: call(perplexity, ""), ["--data", "x"], "test_flags.py: --data is called --file here"),
        (
            lambda: call(train_tokenizer.train_tokenizer, ""),
            ["--vocab", 300, "--data", "x", "--out", "y"],
            "test_flags.py: there is no --vocab here; did you mean --vocab_size?",
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


def test_the_table_names_options_that_there_are_and_no_name_twice():
    known = options()
    assert {name for name in CALLED if not name.startswith("model.")} <= known | {"teacher", "suite"}
    for names, places in INSTEAD.items():
        for option, text in places:
            assert option in known
            assert {found.rstrip(".") for found in re.findall(r"--([a-z_.]+)", text)} <= known | {"nproc_per_node"}
        assert not set(names.split()) & {name for elsewhere in CALLED.values() for name in elsewhere.split()}
    root = Path(__file__).resolve().parents[2]
    assert all((root / script).is_file() for script in OWNERS.values())
