"""The README.md of a checkpoint: what the command, an import and an evaluation write there, and what they leave."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from eval.score_files import weights_of, write_scores
from eval.scores import Measured, Score
from LMConfig import LMConfig
from model.checkpoint.card import card, is_generated, renew_card, write_card
from model.checkpoint.folder import CARD
from model.checkpoint.hf_import import import_folder
from model.checkpoint.public import public, public_words
from model.costs import count, human
from model.hf import main
from training.run.log import read_metrics

KEY = "sk-0123456789"


def text_of(folder: Path) -> str:
    return (folder / CARD).read_text(encoding="utf8")


def front_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture
def copied(pretrained, tmp_path) -> Path:
    """The run folder of `pretrained`, to be changed."""
    return Path(shutil.copytree(pretrained, tmp_path / "pretrain", ignore=shutil.ignore_patterns("state.safetensors")))


def test_the_card_of_a_run_has_its_data_recipe_measures_size_and_command(pretrained):
    final, entries = pretrained / "final", read_metrics(pretrained / "metrics.jsonl")
    text, costs = card(final), count(LMConfig.from_pretrained(final))
    front = front_of(text)
    assert front == {
        "license": "unknown", "language": ["zh", "en"], "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["deepseek_v3", "mini-deepseek-v3"],
    }  # fmt: skip
    assert "\n# pretrain\n" in text and "pretraining on text" in text and "- Data: `pretrain.csv`" in text
    tokens = entries[-1]["tokens"]
    assert f"40 optimiser steps, {tokens:,} tokens" in text and "batch_tokens: 1024" in text and "lr: 0.005" in text
    before, after = (f"{entries[place]['val_bits_per_byte']:.4f}" for place in (0, -1))
    assert before != after and f"| bits per byte of text (less is better) | {before} | {after} |" in text
    assert f"text of `{entries[-1]['held_out']['text']}`" in text
    assert f"{human(costs.total)} parameters, {human(costs.activated)} of which" in text
    assert "python pretrain.py --config tiny.yaml --data pretrain.csv" in text and "--max_steps 40" in text
    assert 'pipeline("text-generation", model="FOLDER")' in text and "full_sft.py --ckpt FOLDER" in text


def test_a_card_names_no_place_of_the_machine(pretrained):
    text = card(pretrained / "final")
    for place in {str(pretrained.parent), str(Path.home()), str(Path.cwd()), os.sep + "tmp", sys.prefix} - {"/"}:
        assert place not in text


def test_words_of_a_command_line_lose_places_and_secrets(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [
        "--data", f"/home/anna berg/a.csv=2,{tmp_path}/data/b.csv", "--ckpt=/srv/anna/sft/final", "--x.api_key", KEY,
        "--token", KEY, f"--wandb={KEY}", "--wandb", KEY, "--teacher", f"http://anna:{KEY}@host/v1", "--resume",
        "--file", "../../anna/c.jsonl", "--model", "{shards: /home/anna/x}", "--max_tokens", "9", "--system", "a/b",
    ]  # fmt: skip
    assert public_words(words) == [
        "--data", "a.csv=2,data/b.csv", "--ckpt=sft/final", "--x.api_key", "...", "--token", "...", "--wandb=...",
        "--wandb", "...", "--teacher", "URL", "--resume", "--file", "c.jsonl", "--model", "{shards: x}",
        "--max_tokens", "9", "--system", "a/b",
    ]  # fmt: skip
    monkeypatch.setenv("HOME", "/home/anna")
    assert public("see /home/anna/x") == "see ~/x"


def test_private_settings_are_left_out(copied):
    settings = yaml.safe_load((copied / "config.yaml").read_text(encoding="utf8"))
    settings |= {"wandb": KEY, "api_key": KEY, "lora": {"hub_token": KEY, "r": 17}, "sample_prompts": KEY, "out": KEY}
    (copied / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf8")
    text = card(copied / "final")
    assert KEY not in text and "r: 17" in text
    assert "Command line" not in text  # the comment is gone, as in older runs
    assert "Settings:" in text and "# pretrain\n" in text


def test_the_command_writes_renews_and_keeps_what_is_edited(make, run):
    first = make(max_steps=2)
    first.run()
    final = first.out / "final"
    assert not (final / CARD).exists()  # training writes none
    assert run(main, "card", final).out == f"{final / CARD}: written\n"
    assert is_generated(text_of(final)) and "2 optimiser steps" in text_of(final)
    make(max_steps=3, resume=True).run()
    assert CARD not in (final / "training/manifest.json").read_text()
    assert run(main, "card", final).code == 0
    assert is_generated(text_of(final)) and "3 optimiser steps" in text_of(final)

    mine = text_of(final).replace("license: unknown", "license: mit")
    (final / CARD).write_text(mine, encoding="utf8")
    assert run(main, "card", final).out == f"{final / CARD}: was edited and stays as it is\n"
    make(max_steps=4, resume=True).run()
    assert text_of(final) == mine and json.loads((final / "training/progress.json").read_text())["step"] == 4
    (final / CARD).unlink()
    assert run(main, "card", final).code == 0 and "4 optimiser steps" in text_of(final)


def test_the_best_checkpoint_has_a_card_of_its_own_step(make, monkeypatch, run):
    monkeypatch.setattr("training.run.progress.Progress.judge", lambda progress, _: progress.step == 1)
    trainer = make(max_steps=3, val_every=1, keep_best=True)
    trainer.run()
    assert run(main, "card", trainer.out / "best", trainer.out / "final").code == 0
    entries = {entry["step"]: f"{entry['val_loss']:.4f}" for entry in read_metrics(trainer.out / "metrics.jsonl")}
    for name, step in (("best", 1), ("final", 3)):
        text = text_of(trainer.out / name)
        assert f"{step} optimiser steps" in text and f"| {entries[0]} | {entries[step]} |" in text


def test_a_disk_that_refuses_ends_the_command_and_only_delays_other_work(copied, run, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.checkpoint.card.os.replace", refuse)
    done = run(main, "card", copied / "final")
    assert done.code == 2 and f"{CARD}: No space left on device; free some space" in done.err
    assert not (copied / "final" / CARD).exists()
    renew_card(copied / "final")
    assert capsys.readouterr().err.startswith(f"notice: {copied / 'final' / CARD}: not written")


def test_a_folder_without_a_model_gets_no_card(run, tmp_path):
    done = run(main, "card", tmp_path)
    assert done.code == 2 and "give a checkpoint folder" in done.err and not list(tmp_path.iterdir())


def test_scores_come_into_the_card_of_the_weights_they_are_of(copied, monkeypatch):
    monkeypatch.setattr("eval.score_files.draw", lambda *_: None)
    final = copied / "final"
    write_card(final)
    scores = [Score("all", "acc", 0.5, 0.25, 0.75, 0.25, 12), Score("easy", "acc", 0.9, items=3)]
    before = weights_of(str(final), "float32")
    write_scores(copied / "eval" / "final", str(final), before, [Measured("made|up", {}, scores, 12, 0, 1.0)])
    write_card(final)
    assert "| made up | acc | 50.0% | 25.0% to 75.0% | 25.0% | 12 |" in text_of(final)
    assert "90.0%" not in text_of(final)
    assert weights_of(str(final), "float32") == before  # a renewed card makes no other model
    os.utime(final / "model.safetensors", (1, 1))
    write_card(final)
    assert "## Scores" not in text_of(final)


def test_an_imported_folder_keeps_its_card_or_has_one_of_its_size(tiny_model, tmp_path):
    theirs = tmp_path / "theirs"
    tiny_model().save_pretrained(theirs)
    import_folder(theirs, tmp_path / "bare")
    text = text_of(tmp_path / "bare")
    assert is_generated(text) and "# bare" in text and "## Size" in text and "## Training" not in text
    (theirs / CARD).write_text("---\nlicense: mit\n---\n", encoding="utf8")
    import_folder(theirs, tmp_path / "carded")
    assert text_of(tmp_path / "carded") == "---\nlicense: mit\n---\n"


DAMAGE = (b"", b"\xff\xfe", b"[]", b"{}", b"[[", b"null", b'{"step": "x", "seconds": []}', b'{"step": 1e999}')
FILES = (
    "metrics.jsonl", "config.yaml", "final/training/progress.json", "final/tokenizer.json", "eval/final/scores.json",
)  # fmt: skip


@pytest.mark.parametrize("content", DAMAGE)
def test_damaged_files_of_a_run_leave_their_part_out(content, copied, capsys):
    final = copied / "final"
    (copied / "eval" / "final").mkdir(parents=True)
    for name in FILES:
        before = (copied / name).read_bytes() if (copied / name).exists() else b""
        (copied / name).write_bytes(content)
        assert "## Size" in card(final)
        (copied / name).write_bytes(before)
    for name in FILES:
        (copied / name).write_bytes(content)
    write_card(final)
    assert "## Size" in text_of(final) and not capsys.readouterr().err


def test_a_line_of_the_log_that_was_cut_short_hides_no_other(copied):
    before, log = card(copied / "final"), copied / "metrics.jsonl"
    log.write_bytes(b'{"step": 0, "val_l\n' + log.read_bytes() + b"[]\n")
    assert card(copied / "final") == before and "## Held-out data" in before
