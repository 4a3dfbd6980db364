"""A teacher asked once: what is kept means what it should, and belongs to its conversation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from divergence_formulas import NAIVE, divergence
from forked import on_ranks

import training.distill.top_k
from dataset import ChatDataset
from training.distill.distillation import Logits
from training.distill.divergences import logit_gradient
from training.distill.teacher import CheckpointTeacher, open_teacher
from training.distill.top_k import (
    IDS,
    LOG_PROBS,
    REST,
    CachedTopKChats,
    TopK,
    cache_top_k,
    fingerprint,
    joined,
)
from training.losses import IGNORE
from training.parallel.ranks import Ranks

N, VOCAB, WIDTH = 40, 61, 24
NAMES = sorted(NAIVE)
CPU = torch.device("cpu")


def kept(log_p: torch.Tensor, k: int) -> TopK:
    """Without the 16 bits of the disk."""
    top, ids = log_p.topk(k)
    rest = [log_p.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)] if k < log_p.shape[1] else []
    return TopK(ids, torch.cat([top, *rest], 1))


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_is_one_event_with_the_gradient_of_autograd(name):
    log_p, z = torch.randn(N, VOCAB).log_softmax(-1), torch.randn(N, VOCAB, requires_grad=True)
    few = kept(log_p, 7)
    q = z.softmax(-1)
    events = torch.cat([q.gather(1, few.ids), q.scatter(1, few.ids, 0.0).sum(1, keepdim=True)], 1)
    p = few.log_probs.exp()
    torch.testing.assert_close(p.sum(1), torch.ones(N))
    naive = NAIVE[name](p, events)
    log_q = z.detach().log_softmax(-1)
    value, flow = few.compare(slice(None), log_q, divergence(name), 1.0)
    torch.testing.assert_close(value, naive.detach(), rtol=1e-4, atol=1e-5)
    (want,) = torch.autograd.grad(naive.sum(), z)
    torch.testing.assert_close(logit_gradient(log_q, flow), want, rtol=1e-4, atol=1e-5)
    whole, _ = divergence(name)(log_p, log_q)
    assert (value <= whole + 1e-6).all() and (value < whole - 1e-3).any()
    sure = torch.full((N, VOCAB), -200.0).scatter_(1, few.ids, 0.0).log_softmax(-1)  # of the top tokens: no NaN
    assert all(part.isfinite().all() for part in few.compare(slice(None), sure, divergence(name), 1.0))


@pytest.mark.parametrize("size", [VOCAB, 70_000])
def test_ids_and_log_probabilities_have_16_bits_where_they_can(size, monkeypatch):
    monkeypatch.setattr(training.distill.top_k, "POSITIONS", 16)
    states, head = torch.randn(N, WIDTH), torch.randn(size, WIDTH)
    arrays = joined([Logits(states, head)], 5, 2.0)
    assert arrays[IDS].dtype == (np.uint16 if size == VOCAB else np.uint32)
    assert arrays[LOG_PROBS].dtype == np.float16 and arrays[REST].dtype == np.float32
    log_p = (states @ head.t() / 2).log_softmax(-1)
    want = kept(log_p, 5)
    assert (arrays[IDS] == want.ids.numpy()).all()
    np.testing.assert_allclose(arrays[LOG_PROBS], want.log_probs[:, :-1], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(arrays[REST], want.log_probs[:, -1], rtol=1e-4, atol=1e-4)


@pytest.fixture
def chats(world, tokenizer, tmp_path, monkeypatch) -> ChatDataset:
    monkeypatch.setattr(training.distill.top_k, "CONVERSATIONS", 16)
    rows = (world / "sft.jsonl").read_text(encoding="utf8").splitlines()[:60]
    (tmp_path / "sft.jsonl").write_text("\n".join(rows), encoding="utf8")
    return ChatDataset([tmp_path / "sft.jsonl"], tokenizer, 128, val_fraction=0.1, progress=False)


@pytest.fixture
def teacher(pretrained, tokenizer) -> CheckpointTeacher:
    return open_teacher(str(pretrained / "final"), tokenizer, 600, torch.float32, CPU)


def keep(folder, chats, teacher, k=8, mark="one", temperature=1.0, ranks=None):
    """What is kept, and how often the teacher was opened."""
    asked = []

    def ask() -> CheckpointTeacher:
        asked.append(1)
        return teacher

    ranks = ranks or Ranks(0, 1, CPU)
    return cache_top_k(folder, chats, k, temperature, mark, ask, 4, torch.float32, ranks), len(asked)


def test_a_batch_has_what_the_teacher_says_of_its_labels(chats, teacher, tmp_path):
    """Other rows, other order, other files: it is still the same conversation's."""
    found, _ = keep(tmp_path, chats, teacher)
    assert len(list(tmp_path.glob("part-*.safetensors"))) > 2
    taught = CachedTopKChats(chats, found)
    assert len(taught) == len(chats)
    for indices in ([0, 1, 2], [len(chats) - 1, len(chats), 2 * len(chats) + 1]):
        batch = taught.batch(indices)
        with torch.no_grad():
            want = kept(teacher(batch).log_probs(slice(None), 1.0), 8)
        said = TopK.of_batch(batch)
        assert len(said.ids) == (batch["labels"] != IGNORE).sum()
        torch.testing.assert_close(said.log_probs, want.log_probs, rtol=3e-3, atol=3e-3)
        assert (said.ids == want.ids).float().mean() > 0.99  # equally probable ones may change places
        torch.testing.assert_close(said.log_probs.exp().sum(1), torch.ones(len(said.ids)))


def test_nobody_is_asked_twice_and_another_teacher_is_asked_again(chats, teacher, tmp_path):
    first, asked = keep(tmp_path, chats, teacher)
    assert asked == 1
    again, asked = keep(tmp_path, chats, teacher)
    assert asked == 0
    for one, other in zip(first.read(range(5)), again.read(range(5)), strict=True):
        assert torch.equal(one, other)
    said, file = first.read(range(40)), sorted(tmp_path.glob("part-*"))[1]
    file.write_bytes(file.read_bytes()[:-100])  # cut short, in the place that `first` reads too: made again
    again, asked = keep(tmp_path, chats, teacher)
    assert asked == 1
    for one, other in zip(said, again.read(range(40)), strict=True):
        assert torch.equal(one, other)
    _, asked = keep(tmp_path, chats, teacher, mark="another")
    assert asked == 1
    facts = [fingerprint(chats.chats, "teacher", 1.0), fingerprint(chats.chats, "teacher", 2.0)]
    chats.chats.mask[3] ^= 1
    assert len({*facts, fingerprint(chats.chats, "teacher", 1.0)}) == 3


def test_ranks_share_the_work(chats, teacher, tmp_path):
    alone, _ = keep(tmp_path / "alone", chats, teacher)

    def of_rank(rank: int) -> None:
        assert keep(tmp_path / "shared", chats, teacher, ranks=Ranks.start("cpu", timeout=20.0))[1] == 1

    assert [rank.code for rank in on_ranks(2, of_rank, tmp_path)] == [0, 0]
    shared, asked = keep(tmp_path / "shared", chats, teacher)
    assert asked == 0
    for one, other in zip(alone.read(range(9)), shared.read(range(9)), strict=True):
        torch.testing.assert_close(one, other)
