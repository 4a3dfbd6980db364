"""The whole path of `make demo` at a tiny size, through the real scripts: from nothing to a model that chats.

The chat is a process of its own; the other scripts are called as their command lines call them.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import long_lines

from cli import call, parse
from distill import DistillSettings
from dpo_train import DPOSettings
from eval.report import report
from full_sft import SFTSettings
from grpo_train import GRPOSettings
from lora_sft import LoraSFTSettings
from pretrain import PretrainSettings
from training.run.log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("pretrain", "sft", "dpo", "grpo")


def python(*arguments: object) -> subprocess.CompletedProcess:
    """Run a script of the project as a person does, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return done


def test_no_line_of_any_stage_is_longer_than_a_hundred_characters(demo_path):
    said = (demo_path / "said.txt").read_text(encoding="utf8")
    assert said.count("finished: ") == 4 and not long_lines(said, demo_path)


def test_a_stage_of_few_steps_says_so_before_the_first(demo_path):
    pretraining, tuning, preferring, solving, _ = (
        (demo_path / "said.txt").read_text(encoding="utf8").split("finished: ")
    )
    few = "notice: this run ends after 2 steps (--max_steps 2), too few to learn"
    for said in (preferring, solving):
        assert 0 < said.find(few) < said.find("step      1 ")
    assert "too few" not in pretraining + tuning


@pytest.mark.parametrize(("stage", "steps", "fall"), [("pretrain", 40, 0.8), ("sft", 30, 0.5)])
def test_the_loss_falls_in_each_stage(stage, steps, fall, demo_path):
    entries = read_metrics(demo_path / stage / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(steps + 1))
    assert entries[-1]["loss"] < entries[1]["loss"] - fall
    assert entries[-1]["val_bits_per_byte"] < entries[0]["val_bits_per_byte"]


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_leaves_a_complete_folder(stage, demo_path):
    """Which transformers opens with the same logits: model/test_transformers.py."""
    names = {str(file.relative_to(demo_path / stage)) for file in (demo_path / stage).rglob("*") if file.is_file()}
    assert names >= {"config.yaml", "metrics.jsonl", "final/generation_config.json", "final/training/state.safetensors"}
    assert not [name for name in names if "partial" in name or name.endswith((".tmp", ".part"))]


def test_a_script_waits_for_no_library_that_it_may_not_need():
    """Each of them takes as long to import as torch, or longer."""
    slow = {"torch._dynamo", "sympy", "transformers", "datasets", "pandas", "peft", "wandb", "matplotlib", "torchao"}
    scripts = "pretrain, full_sft, lora_sft, dpo_train, grpo_train, distill, dataset, train_tokenizer, eval.chat"
    python("-c", f"import sys, {scripts}; found = {slow} & sys.modules.keys(); assert not found, found")


def test_the_result_chats(demo_path):
    done = python(
        "eval/chat.py", "--ckpt", demo_path / "sft" / "final", "--once", "你好", "--temperature", 0, "--device", "cpu"
    )
    # What so little training says, if anything, is not known beforehand; that it ends its turn and is timed is.
    assert done.returncode == 0 and re.fullmatch(r"\[\d+ tokens, [\d.]+ tok/s\]", done.stderr.strip())


def test_the_report_shows_every_stage(demo_path, run):
    options = ["--out", demo_path, "--questions", demo_path / "questions.jsonl", "--samples", 2, "--dtype", "fp32"]
    done = run(lambda: call(report, ""), *options, "--favours", demo_path / "favours.jsonl")
    assert done.code == 0, done.err
    page = (demo_path / "report" / "report.md").read_text(encoding="utf8")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert [row[0] for row in table[2:4]] == ["bits per byte", "exact answers"] and len(table) > 6
    bits = dict(zip(table[0][1:], map(float, table[2][1:]), strict=True))
    assert list(bits) == ["untrained", *STAGES] and bits["pretrain"] < bits["untrained"] - 0.5
    # On the text that pretraining held out.
    last = read_metrics(demo_path / "pretrain" / "metrics.jsonl")[-1]
    assert bits["pretrain"] == pytest.approx(last["val_bits_per_byte"], abs=0.001)
    assert table[-1][0] == "preferred style" and all(cell.endswith("%") for cell in table[-1][1:])
    assert page.count("> **") == 2 and all(f"![{stage}]({stage}.png)" in page for stage in STAGES)
    for stage in STAGES:
        assert (demo_path / "report" / f"{stage}.png").read_bytes().startswith(b"\x89PNG")
    assert "untrained" in done.out and str(demo_path / "report" / "report.md") in done.out.replace("\n", "")
    assert done.out.endswith(f"all on one page: {demo_path / 'report.html'}\n")
    # All stages together, and each; what pretraining wrote on the way, and the command line that began it.
    whole = (demo_path / "report.html").read_text(encoding="utf8")
    assert whole.count("data:image/png;base64,") == 5 and "What the model wrote on the way" in whole
    assert "<pre>python pretrain.py --config" in whole and "activated, MTP adds" in whole
    assert f'<td class="number">{table[2][1]}</td>' in whole and "right answer" in whole


def commands(*variables: str, target: str = "demo") -> list[list[str]]:
    """What `make demo` would run, without what installs."""
    done = subprocess.run(["make", "-n", target, *variables], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]
    return [line[1:] for line in lines if line and line[0] == ".venv/bin/python" and "pip" not in line]


DIAL = ("3", "7", "14", "30")


@pytest.mark.parametrize("minutes", DIAL)
def test_minutes_of_make_demo_are_a_line_of_tokens_and_steps(minutes, tmp_path):
    """No stage has a clock, whose models a busy machine would change; more minutes are more of each, elsewhere."""
    table = [line.split() for line in (ROOT / "configs/demo/budgets.txt").read_text().splitlines() if line[0] != "#"]
    assert [line[0] for line in table] == [*DIAL] and all(len(line) == 9 and line[5] == "|" for line in table)
    for column in range(1, 5):
        numbers = [int(line[column]) for line in table]
        assert numbers == sorted(numbers)
    made = commands(f"MINUTES={minutes}", f"WORLD={tmp_path}")[2:6]
    kinds = (PretrainSettings, SFTSettings, DPOSettings, GRPOSettings)
    stages = [parse(kind, "", command[1:]) for kind, command in zip(kinds, made, strict=True)]
    spent = [stages[0].max_tokens, stages[1].max_tokens, stages[2].max_steps, stages[3].max_steps]
    assert [str(number) for number in spent] == table[DIAL.index(minutes)][1:5]
    assert all(stage.max_minutes is None for stage in stages)
    folder = "out/demo" if minutes == "7" else f"out/demo-{minutes}"
    assert {str(Path(stage.out).parent) for stage in stages} == {folder}


def test_a_seed_of_make_demo_is_one_of_all_stages_in_a_folder_of_its_own(tmp_path):
    kinds = (PretrainSettings, SFTSettings, DPOSettings, GRPOSettings)
    made = commands("MINUTES=3", "SEED=5", f"WORLD={tmp_path}")[2:6]
    stages = [parse(kind, "", command[1:]) for kind, command in zip(kinds, made, strict=True)]
    assert {(stage.seed, str(Path(stage.out).parent)) for stage in stages} == {(5, "out/demo-3-seed5")}


@pytest.mark.parametrize("minutes", ["", "5", "7 14", "07", "%", "."])
def test_other_minutes_are_refused_in_one_line_with_the_four(minutes):
    command = ["make", "-n", "--no-print-directory", "demo", f"MINUTES={minutes}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"MINUTES={minutes}: give one of {' '.join(DIAL)}," in done.stderr


def test_make_demo_says_first_what_it_spends_and_what_to_expect(tmp_path):
    def said(*variables: str) -> list[str]:
        command = ["make", "-n", "--no-print-directory", "demo", *variables]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()[:2]

    spends, expects = said("MINUTES=3")
    assert re.fullmatch(r"MINUTES=3 into out/demo-3: \d+ tokens of pretraining, \d+ of fine-tuning, .*", spends)
    assert re.fullmatch(r"expect about \d+ % exact answers .*, \d+ % .*, \d+ % of held-out sums", expects)
    (tmp_path / "my.csv").touch()
    spends, other = said(f"DATA={tmp_path / 'my.csv'}")
    assert spends.startswith("MINUTES=7 into out/my: ") and "expect" not in other


def test_no_recipe_of_the_demo_or_the_r1_path_ends_by_the_clock():
    recipes = [file for folder in ("demo", "r1") for file in (ROOT / "configs" / folder).glob("*.yaml")]
    assert len(recipes) == 12
    assert [file for file in recipes if "max_minutes" in yaml.safe_load(file.read_text(encoding="utf8"))] == []


def test_make_demo_runs_the_stages_in_order(tmp_path):
    world, out = tmp_path / "world", tmp_path / "out"
    made = commands(f"WORLD={world}", f"OUT={out}")
    scripts = [command[1] if command[0] == "-m" else command[0] for command in made]
    assert scripts == [
        "world", "train_tokenizer.py", "pretrain.py", "full_sft.py", "dpo_train.py", "grpo_train.py",
        "eval/report.py", "model.hf",
    ]  # fmt: skip
    assert made[-1][2:] == ["card", *(f"{out}/{stage}/final" for stage in ("pretrain", "sft", "dpo", "grpo"))]
    solving = parse(GRPOSettings, "", made[5][1:])
    assert (solving.ckpt, solving.data, solving.out) == (f"{out}/dpo/final", "arithmetic:1-2", f"{out}/grpo")
    assert solving.resume
    preferring = parse(DPOSettings, "", made[4][1:])
    assert (preferring.ckpt, preferring.data) == (f"{out}/sft/final", f"{world}/preferences.jsonl")
    assert preferring.resume and preferring.out == f"{out}/dpo"
    pretraining, tuning = parse(PretrainSettings, "", made[2][1:]), parse(SFTSettings, "", made[3][1:])
    data = f"{world}/pretrain.csv=6,{world}/lessons.csv=1"
    assert (pretraining.data, pretraining.tokenizer) == (data, f"{out}/tokenizer")
    assert (tuning.ckpt, tuning.data) == (f"{pretraining.out}/final", f"{world}/sft.jsonl")
    assert pretraining.resume and tuning.resume and tuning.out == f"{out}/sft"


def test_make_demo_takes_a_persons_own_text(tmp_path):
    text = tmp_path / "my.csv"
    text.write_text("text\n", encoding="utf8")
    made = commands(f"WORLD={tmp_path / 'world'}", f"DATA={text}", f"OUT={tmp_path / 'out'}")
    read = [command[command.index("--data") + 1] for command in made if "--data" in command]
    assert read[:2] == [str(text)] * 2  # by train_tokenizer.py and pretrain.py


def test_make_r1_walks_the_path_from_config_to_config(tmp_path):
    """Each step has a config that its script reads, and begins at the base or where an earlier step ended."""
    world, out = tmp_path / "world", tmp_path / "out"
    made = commands(f"WORLD={world}", f"OUT={out}", target="r1")[3:]
    scripts = [command[1] if command[0] == "-m" else command[0] for command in made]
    assert scripts == [
        "world.reasoning", "full_sft.py", "grpo_train.py", "full_sft.py", "grpo_train.py", "distill.py",
        "full_sft.py", "grpo_train.py", "eval/reasoning.py",
    ]  # fmt: skip
    kinds = {"full_sft.py": SFTSettings, "grpo_train.py": GRPOSettings, "distill.py": DistillSettings}
    steps = [
        parse(kinds[script], "", command[1:]) for script, command in zip(scripts, made, strict=True) if script in kinds
    ]
    made_before = {f"{out}/pretrain/final"}
    for step in steps:
        assert (step.ckpt or step.teacher) in made_before
        made_before.add(f"{step.out}/final")
    assert len({step.out for step in steps}) == 7 and steps[5].data == steps[4].out
    assert made[-1][made[-1].index("--ckpt") + 1].split(",") == [f"{s.out}/final" for s in steps if s is not steps[4]]


def test_make_lora_trains_on_the_fine_tuned_model_and_measures_before_and_after(tmp_path):
    world, out = tmp_path / "world", tmp_path / "out"
    made = commands(f"WORLD={world}", f"OUT={out}", target="lora")
    scripts = [command[1] if command[0] == "-m" else command[0] for command in made]
    assert scripts[-5:] == [
        "world.greeting_messages", "lora_sft.py", "eval/style.py", "eval/style.py", "eval/questions.py",
    ]  # fmt: skip
    generated, tuned, before, after, kept = made[-5:]
    settings = parse(LoraSFTSettings, "", tuned[1:])
    assert (settings.ckpt, settings.out, settings.resume) == (f"{out}/sft/final", f"{out}/lora", True)
    assert settings.data == f"{generated[-1]}/train.json=3,{world}/sft.jsonl=1"
    assert "--lora" not in before and before[-1] == after[-1] == f"{generated[-1]}/heldout.jsonl"
    for measured in (after, kept):
        assert measured[measured.index("--lora") + 1] == f"{out}/lora/final"
