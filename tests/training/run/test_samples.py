"""A person reads what the model writes while it is trained, and the training does not notice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import on_ranks
from toy_stage import Rows, files

import full_sft
import pretrain
import training.run.samples
from errors import UserError
from text.tokenizer import Tokenizer
from training.chats import chat_prompts
from training.parallel.ranks import Ranks
from training.run.log import read_metrics
from training.run.samples import LONGEST, Samples, open_samples, read_prompts, text_prompts
from training.trainer import Trainer

PROMPTS = [[3, 120, 130], [3, 140]]


def with_samples(trainer: Trainer, every: int = 0, compiled: bool = False) -> Trainer:
    trainer.samples = Samples(every, PROMPTS, trainer.tokenizer, trainer.out, trainer.ranks, compiled)
    return trainer


def written(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf8").splitlines()]


def test_samples_change_no_number_of_the_training(make):
    plain, sampled = make("plain", val_every=2), with_samples(make("sampled", val_every=2), every=1)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    sampled.out.mkdir(parents=True)
    sampled.samples.write(sampled.model, 0, print)
    assert torch.equal(torch.get_rng_state(), before) and sampled.model.training
    for trainer in (plain, sampled):
        trainer.run()
    losses = [[entry["loss"] for entry in read_metrics(trainer.out / "metrics.jsonl")] for trainer in (plain, sampled)]
    assert losses[0] == losses[1]
    assert files(plain.out / "final") == files(sampled.out / "final")
    assert [entry["step"] for entry in written(sampled.out)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_samples_come_with_each_validation_or_when_asked_for(make):
    validated = with_samples(make("validated", val_every=2, max_steps=5))
    validated.run()
    assert [entry["step"] for entry in written(validated.out)[::2]] == [0, 2, 4, 5]
    every = with_samples(make("every", max_steps=5), every=3)
    every.validation = None
    every.run()
    assert [entry["step"] for entry in written(every.out)[::2]] == [0, 3, 5]


def test_a_sample_is_the_greedy_continuation_and_is_shown_in_one_line(make, capsys):
    trainer = with_samples(make(max_steps=1))
    trainer.run()
    entry = written(trainer.out)[-1]
    shown = []
    trainer.ranks.watch.show = lambda *what: shown.append(what)
    trainer.samples.write(trainer.model, 1, lambda *_: None)
    shares = [done for what, done, _ in shown if what]
    assert shares == sorted(set(shares)) and shares[-1] <= len(PROMPTS) == shown[0][2] and shown[-1] == ("", 0, 0)
    ids = trainer.model.eval().generate(
        torch.tensor([PROMPTS[1]]), max_new_tokens=training.run.samples.NEW, eos_token_id=trainer.tokenizer.eos_id
    )[0]
    new = ids[len(PROMPTS[1]) :].tolist()
    assert entry["text"] == trainer.tokenizer.decode([token for token in new if token != trainer.tokenizer.eos_id])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample  ")]
    assert len(lines) == 4 and all(len(line) <= 100 for line in lines)


def test_a_resumed_run_writes_each_sample_once(make):
    with_samples(make(max_steps=4, save_every=2), every=1).run()
    out = make().out
    shutil.rmtree(out / "final")
    with open(out / "samples.jsonl", "a", encoding="utf8") as file:
        file.write('{"step": 1, "te')  # a kill cut it short
    with_samples(make(max_steps=4, resume=True), every=1).run()
    assert [entry["step"] for entry in written(out)[::2]] == [0, 1, 2, 3, 4]


def test_one_rank_writes_and_the_others_wait(make, tmp_path):
    def train(rank: int) -> None:
        trainer = with_samples(make(ranks=Ranks.start("cpu", timeout=20.0), max_steps=2), every=1)
        trainer.run()

    assert [rank.code for rank in on_ranks(2, train, tmp_path)] == [0, 0]
    assert [entry["step"] for entry in written(tmp_path / "run")] == [0, 0, 1, 1, 2, 2]


def test_others_do_not_wait_longer_than_a_part_of_their_timeout(make, tmp_path):
    trainer = make(ranks=Ranks(0, 1, torch.device("cpu"), timeout=0.0))
    trainer.out.mkdir(parents=True)
    with_samples(trainer).samples.write(trainer.model, 0, print)
    assert [len(entry["text"]) <= 2 for entry in written(trainer.out)] == [True, True]


def test_prompts_of_a_file_are_texts_or_questions(tokenizer: Tokenizer, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffOnce upon a time\n\n你好\n", encoding="utf8")
    lines = read_prompts(str(file))
    texts = text_prompts(tokenizer, lines, [])
    assert [ids[0] for ids in texts] == [tokenizer.eos_id] * 2
    assert [tokenizer.decode(ids[1:]) for ids in texts] == ["Once upon a time", "你好"]
    asked = chat_prompts(tokenizer, lines, [])
    first, second = (tokenizer.raw.decode(ids, skip_special_tokens=False) for ids in asked)
    assert "Once upon a time" in first and "你好" in second and len(second) > len("你好")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n", "empty; give one prompt a line"),
        (b"\xff\xfe\xff", "cannot be read"),
        ("a" * 5000, "tokens long, but 256 is the most; shorten it"),
    ],
)
def test_a_file_without_usable_prompts_is_refused(content, message, tokenizer, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    settings = SimpleNamespace(sample_every=1, sample_prompts=str(file), out=str(tmp_path), compile=False)
    with pytest.raises(UserError, match=message):
        open_samples(settings, tokenizer, Ranks(0, 1, torch.device("cpu")), Rows(), True, chat_prompts)


def test_built_in_prompts_are_beginnings_of_documents_and_whole_questions():
    eos_is_2 = SimpleNamespace(eos_id=2)
    rows = [{"input_ids": torch.tensor([[9, 8, 2, *range(100, 130)]])}] * 2
    rows.append({"input_ids": torch.arange(200, 233)[None]})
    assert text_prompts(eos_is_2, [], rows) == [[2, *range(100, 116)], [2, *range(200, 216)]]
    labels = torch.full((1, 10), -100)
    labels[0, 4:6] = 7
    ids = torch.arange(10)[None]
    nothing, answered = torch.full((1, 10), -100), labels
    rows = [{"input_ids": ids, "labels": labels} for labels in (nothing, answered)]
    assert chat_prompts(None, [], rows) == [[0, 1, 2, 3, 4]]
    late = torch.full((1, 999), -100).index_fill_(1, torch.tensor([LONGEST]), 7)
    assert chat_prompts(None, [], [{"input_ids": torch.zeros(1, 999), "labels": late}] * 3) == []


@pytest.fixture(scope="module")
def short() -> list[object]:
    return ["--max_steps", 2, "--dtype", "fp32", "--device", "cpu"]


def test_pretraining_continues_held_out_texts(pretrain_arguments, short, tmp_path, run):
    assert run(pretrain.main, *pretrain_arguments, *short, "--out", tmp_path / "run").code == 0
    assert [entry["step"] for entry in written(tmp_path / "run")] == [0, 0, 2, 2]
    assert open_samples(SimpleNamespace(sample_every=0), None, None, [], False, text_prompts) is None
    asked = ["--val_fraction", 0, "--shards", tmp_path / "shards", "--sample_every", 2, "--out", tmp_path / "asked"]
    assert run(pretrain.main, *pretrain_arguments, *short, *asked).code == 0
    assert len(written(tmp_path / "asked")) == 4


def test_fine_tuning_answers_held_out_questions(pretrained, world, short, tmp_path, run: Callable):
    given = ["--ckpt", pretrained / "final", "--data", world / "sft.jsonl", "--sequence_length", 64]
    given += ["--batch_tokens", 512, "--val_tokens", 1024, "--val_fraction", 0.05, "--out", tmp_path / "run"]
    assert run(full_sft.main, *given, *short).code == 0
    entries = written(tmp_path / "run")
    assert [entry["step"] for entry in entries] == [0, 0, 2, 2] and entries[0]["prompt"] == entries[2]["prompt"]
    assert entries[0]["prompt"].strip()
