"""Teachers of both kinds say at the labels what they say by themselves; those that cannot be compared are refused."""

from __future__ import annotations

import builtins
import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import distill
from errors import UserError
from LMConfig import LMConfig
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.distill.distillation import DistillationLoss, DistillationSettings
from training.distill.divergences import forward_kl
from training.distill.teacher import TransformersTeacher, is_plain, open_teacher, unpacked
from training.losses import IGNORE, NextTokenLoss
from training.run.log import read_metrics

CPU = torch.device("cpu")
EVERYTHING = slice(None)


def packed() -> dict[str, torch.Tensor]:
    """Two packed rows with padding, in which some labels do not count."""
    segments = torch.tensor([[0] * 5 + [1] * 7 + [-1] * 4, [0] * 14 + [-1] * 2])
    positions = torch.tensor([[*range(5), *range(7), *range(4)], [*range(14), *range(2)]])
    ids = torch.randint(13, 600, (2, 17))
    labels = ids[:, 1:].masked_fill((torch.rand(2, 16) < 0.4) | (segments < 0), IGNORE)
    return {"input_ids": ids[:, :-1], "labels": labels, "segment_ids": segments, "position_ids": positions}


def one_by_one(logits_of, batch) -> torch.Tensor:
    """What a model says at the labels when it reads every segment alone."""
    rows = []
    for row in range(len(batch["labels"])):
        for segment in range(int(batch["segment_ids"][row].max()) + 1):
            here = batch["segment_ids"][row] == segment
            counted = batch["labels"][row][here] != IGNORE
            rows.append(logits_of(batch["input_ids"][row][here][None])[0][counted])
    return torch.cat(rows).log_softmax(-1)


def more_tokens(folder: Path, size: int, into: Path) -> Path:
    """A copy of a checkpoint whose tokenizer and model know `size` tokens; the first ones as before."""
    shutil.copytree(folder, into)
    content = json.loads((into / "tokenizer.json").read_text(encoding="utf8"))
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] |= {f"Ġ{number}": number for number in range(max(vocab.values()) + 1, size)}
    (into / "tokenizer.json").write_text(json.dumps(content), encoding="utf8")
    old = MiniDeepSeek.from_pretrained(folder)
    torch.manual_seed(1)
    model = MiniDeepSeek(LMConfig(**{**vars(old.config), "vocab_size": size}))
    state = {name: value for name, value in old.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], model.state_dict()[name][len(state[name]) :]])
    model.load_state_dict(state)
    model.save_pretrained(into)
    return into


@pytest.fixture(scope="session")
def llama(tokenizer, tmp_path_factory) -> Path:
    """A model of another family, as transformers keeps it, with our tokens and some more."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=640, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_a_teacher_gives_the_logits_of_each_conversation_alone(kind, pretrained, llama, tokenizer):
    folder = pretrained / "final" if kind == "ours" else llama
    batch, teacher = packed(), open_teacher(str(folder), tokenizer, 600, torch.float32, CPU)
    assert kind == "ours" or (isinstance(teacher, TransformersTeacher) and teacher.plain)
    with torch.no_grad():
        got = teacher(batch).log_probs(EVERYTHING, 1.0)
        want = one_by_one(lambda ids: teacher.model(ids).logits[..., :600], batch)
    assert len(got) == (batch["labels"] != IGNORE).sum()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert kind != "ours" or not any(p.requires_grad for p in teacher.model.parameters())


def test_logits_that_are_no_plain_product_are_taken_whole(llama, tokenizer):
    class Capped(nn.Module):
        """As Gemma 2 caps its logits."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.base_model = inner, inner.base_model

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.get_output_embeddings()

        def forward(self, **inputs):
            out = self.inner(**inputs)
            out.logits = 3 * torch.tanh(out.logits / 3)
            return out

    inner = open_teacher(str(llama), tokenizer, 600, torch.float32, CPU).model
    capped, batch = Capped(inner), packed()
    assert is_plain(inner, CPU) and not is_plain(capped, CPU)
    with torch.no_grad():
        got = TransformersTeacher(capped, 600, False)(batch).log_probs(EVERYTHING, 1.0)
        want = one_by_one(lambda ids: capped(input_ids=ids).logits[..., :600], batch)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_our_own_checkpoint_is_the_same_teacher_by_transformers(pretrained, tokenizer, monkeypatch):
    """Two implementations of one network, one of which does not know about packing."""
    batch, folder = packed(), str(pretrained / "final")
    ours = open_teacher(folder, tokenizer, 600, torch.float32, CPU)
    monkeypatch.setattr("training.distill.teacher.is_ours", lambda name: False)
    theirs = open_teacher(folder, tokenizer, 600, torch.float32, CPU)
    assert isinstance(theirs, TransformersTeacher)
    with torch.no_grad():
        one, other = (teacher(batch).log_probs(EVERYTHING, 2.0) for teacher in (ours, theirs))
        prepared = theirs(theirs.prepare(batch)).log_probs(EVERYTHING, 2.0)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert torch.equal(prepared, other)


def test_rows_without_segments_stay_as_they_are_and_padding_alone_asks_nothing(llama, tokenizer):
    batch = packed()
    ids, row, column = unpacked({name: batch[name] for name in ("input_ids", "labels")})
    assert ids is batch["input_ids"] and (batch["labels"][row, column] != IGNORE).all()
    assert len(row) == (batch["labels"] != IGNORE).sum()
    batch["labels"], batch["segment_ids"] = (torch.full_like(batch["labels"], value) for value in (IGNORE, -1))
    assert len(open_teacher(str(llama), tokenizer, 600, torch.float32, CPU)(batch).hidden) == 0


def test_more_tokens_are_cut_and_the_rest_made_whole(pretrained, tokenizer, tmp_path):
    larger = more_tokens(pretrained / "final", 650, tmp_path / "larger")
    batch, teacher = packed(), open_teacher(str(larger), tokenizer, 600, torch.float32, CPU)
    with torch.no_grad():
        got = teacher(batch).log_probs(EVERYTHING, 1.0)
        whole = one_by_one(lambda ids: teacher.model(ids).logits, batch).exp()[:, :600]
    assert (whole.sum(-1) < 0.999).any()
    torch.testing.assert_close(got.exp(), whole / whole.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_fewer_tokens_are_refused(pretrained, tokenizer, tmp_path):
    larger = Tokenizer.from_folder(more_tokens(pretrained / "final", 650, tmp_path / "larger"))
    with pytest.raises(UserError, match=r"knows 600 tokens, the student 650; .*--method answers"):
        open_teacher(str(pretrained / "final"), larger, 650, torch.float32, CPU)


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_other_tokens_at_the_same_numbers_are_refused(kind, pretrained, llama, tokenizer, tmp_path):
    folder = Path(shutil.copytree(pretrained / "final" if kind == "ours" else llama, tmp_path / "other"))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf8"))
    vocab = content["model"]["vocab"]
    names = {number: token for token, number in vocab.items()}
    vocab[names[598]], vocab[names[599]] = 599, 598
    file.write_text(json.dumps(content), encoding="utf8")
    with pytest.raises(UserError, match=r"its token 598 is .*, the student's .*--method answers") as caught:
        open_teacher(str(folder), tokenizer, 600, torch.float32, CPU)
    assert "\n" not in str(caught.value)


def test_a_name_that_nobody_knows_is_one_line(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"^[^\n]* cannot be opened [^\n]*$"):
        open_teacher(str(tmp_path), tokenizer, 600, torch.float32, CPU)


def test_without_transformers_only_our_checkpoints_are_teachers(pretrained, llama, tokenizer, monkeypatch):
    known = builtins.__import__

    def without(name, *rest, **more):
        if name == "transformers":
            raise ImportError(name)
        return known(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install transformers"):
        open_teacher(str(llama), tokenizer, 600, torch.float32, CPU)
    assert open_teacher(str(pretrained / "final"), tokenizer, 600, torch.float32, CPU)


def test_the_command_takes_a_teacher_of_another_family(llama, pretrained, world, run, tmp_path):
    given = ["--ckpt", pretrained / "final", "--teacher", llama, "--data", world / "sft.jsonl", "--max_steps", 2]
    given += ["--sequence_length", 96, "--batch_tokens", 480, "--dtype", "fp32", "--log_every", 1, "--val_fraction", 0]
    for name, options in (("data", []), ("sampled", ["--on_policy", 1])):
        done = run(distill.main, *given, "--out", tmp_path / name, *options)
        assert done.code == 0, done.err
    data, sampled = (
        [e["divergence"] for e in read_metrics(tmp_path / name / "metrics.jsonl") if e["step"]]
        for name in ("data", "sampled")
    )
    assert min(data) > 0 and sampled != data


def distillation(teacher, **changes) -> DistillationLoss:
    return DistillationLoss(settings=DistillationSettings(**changes), teacher=teacher)


def test_the_loss_has_the_parts_of_next_token_prediction(pretrained, tokenizer):
    """Cross entropy alone is fine-tuning's loss to the last part: MTP, balance and loads."""
    folder = str(pretrained / "final")
    teacher, student = open_teacher(folder, tokenizer, 600, torch.float32, CPU), MiniDeepSeek.from_pretrained(folder)
    batch = packed()
    want, count, parts = NextTokenLoss()(student, batch)
    got, counted, metrics = distillation(teacher, ce_weight=1.0)(student, batch)
    torch.testing.assert_close(got, want)
    assert counted == count and set(metrics) == {*parts, "divergence", "cross_entropy"}
    for name in parts:
        torch.testing.assert_close(metrics[name], parts[name])
    # A student that is its teacher is at distance 0, whatever the loss.
    assert abs(metrics["divergence"].item()) < 1e-3


def test_on_its_own_answers_a_student_learns_from_the_teacher_alone(pretrained, tokenizer):
    folder = str(pretrained / "final")
    teacher, student = open_teacher(folder, tokenizer, 600, torch.float32, CPU), MiniDeepSeek.from_pretrained(folder)
    with torch.no_grad():
        student.lm_head.weight.add_(0.1 * torch.randn_like(student.lm_head.weight))
    batch, loss = packed(), distillation(teacher, ce_weight=0.5, loss="forward_kl", temperature=1.0)
    loss.balance_weight = 0.0
    mixed, _, metrics = loss(student, batch)
    half = 0.5 * metrics["divergence"] + 0.5 * metrics["cross_entropy"]
    torch.testing.assert_close(mixed, half + 0.3 * metrics["mtp"])
    total, _, metrics = loss(student, {**batch, "sampled": torch.tensor(1)})
    torch.testing.assert_close(total, metrics["divergence"])
    # Every parameter has a gradient, the chain's too: DDP waits for all of them.
    total.backward()
    assert all(p.grad is not None for p in student.mtp.parameters())


def test_the_divergence_is_the_one_of_whole_logits(pretrained, tokenizer, tmp_path):
    teacher = open_teacher(str(pretrained / "final"), tokenizer, 600, torch.float32, CPU)
    student, batch = copy.deepcopy(teacher.model), packed()
    with torch.no_grad():
        student.lm_head.weight.mul_(0.7)
    _, _, metrics = distillation(teacher, loss="forward_kl", temperature=2.0)(student, batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    counted = batch["labels"] != IGNORE
    with torch.no_grad():
        p, q = ((model(**inputs).logits[counted] / 2).log_softmax(-1) for model in (teacher.model, student))
    torch.testing.assert_close(metrics["divergence"], forward_kl(p, q)[0].sum(), rtol=1e-4, atol=1e-4)
