"""The losses are what the paper says, whatever the chunks, few in their row counts; micro-batches add up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import model.kernels as kernels
import training.losses
from model.kernels import fused
from training.distill.distillation import Logits, distillation_sum
from training.distill.divergences import forward_kl
from training.log_probs import log_probs_and_entropy
from training.losses import IGNORE, NextTokenLoss, cross_entropy_sum, labels_ahead, token_losses

ROWS, HIDDEN, VOCAB = 150, 24, 61


CHUNKS = {"chunks of 64": 64 * VOCAB, "chunks of 100": 100 * VOCAB, "one chunk": 2**22}


@pytest.fixture(params=[*CHUNKS, "chunks of 64 on CUDA", "one chunk on CUDA"])
def chunks(request, monkeypatch) -> None:
    name, on, _ = request.param.partition(" on CUDA")
    monkeypatch.setattr(training.losses, "CUDA_CHUNK_ELEMENTS" if on else "CHUNK_ELEMENTS", CHUNKS[name])
    if on:
        request.getfixturevalue("on_cuda")


def problem(counted: float = 0.7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, head and labels, of which a share counts."""
    hidden = torch.randn(2, ROWS // 2, HIDDEN, requires_grad=True)
    head = torch.randn(VOCAB, HIDDEN, requires_grad=True)
    labels = torch.randint(VOCAB, (2, ROWS // 2))
    return hidden, head, labels.masked_fill(torch.rand(labels.shape) >= counted, IGNORE)


def reference(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ head.t()).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE)


def test_chunked_cross_entropy_is_the_plain_one_with_its_gradients(chunks):
    hidden, head, labels = problem()
    loss, plain = cross_entropy_sum(hidden, head, labels), reference(hidden, head, labels)
    torch.testing.assert_close(loss, plain)
    # The gradient arrives scaled, as from a loss that is divided by a count.
    got, want = (torch.autograd.grad(value * 0.037, (hidden, head)) for value in (loss, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_right_one(frozen, chunks):
    hidden, head, labels = problem()
    rest = {"hidden": head, "head": hidden}[frozen]
    {"hidden": hidden, "head": head}[frozen].requires_grad_(False)
    (want,) = torch.autograd.grad(reference(hidden, head, labels), rest)
    cross_entropy_sum(hidden, head, labels).backward()
    torch.testing.assert_close(rest.grad, want, rtol=1e-4, atol=1e-5)
    assert {"hidden": hidden, "head": head}[frozen].grad is None


def test_without_gradient_the_value_is_the_same(chunks):
    hidden, head, labels = problem()
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_sum(hidden, head, labels), reference(hidden, head, labels))


def test_labels_that_do_not_count_give_zero_and_no_nan(chunks):
    hidden, head, labels = problem(counted=0)
    with torch.no_grad():
        hidden[0, 0] = 1e4  # a wild state behind a label that does not count is nobody's business
    loss = cross_entropy_sum(hidden, head, labels)
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not head.grad.any()


@pytest.mark.parametrize("compiler", [True, False], ids=["in C", "by PyTorch"])
def test_a_sure_token_keeps_its_loss_and_gradient_in_bfloat16(compiler, monkeypatch):
    """p = 0.9995 is 1 in bfloat16, but its loss is not 0."""
    if not compiler:
        monkeypatch.setattr(fused, "available", lambda x: False)
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    head = torch.tensor([[8.0], [0.25], [0.0], [-0.5]], requires_grad=True)
    loss = cross_entropy_sum(hidden, head, torch.tensor([0]))
    loss.backward()
    exact = head.detach().double().squeeze(1)
    error = exact.softmax(0) - torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    assert loss.item() == pytest.approx(-exact.log_softmax(0)[0].item(), rel=1e-3) and loss.item() > 1e-4
    torch.testing.assert_close(head.grad.double().squeeze(1), error, rtol=1e-2, atol=0)
    torch.testing.assert_close(hidden.grad.double().squeeze(), (error * exact).sum(), rtol=2e-2, atol=0)


def test_a_tied_head_collects_both_gradients(tiny_model):
    model = tiny_model(tie_word_embeddings=True)
    ids, labels = torch.randint(VOCAB, (2, 12)), torch.randint(VOCAB, (2, 12))
    out = model(ids)
    (got,) = torch.autograd.grad(cross_entropy_sum(out.hidden, out.head, labels), model.lm_head.weight)
    out = model(ids)
    (want,) = torch.autograd.grad(reference(out.hidden, out.head, labels), model.model.embed_tokens.weight)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_token_losses_are_those_of_each_label(chunks):
    hidden, head, labels = problem()
    losses = token_losses(hidden, head, labels)
    each = F.cross_entropy((hidden @ head.t()).transpose(1, 2), labels, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(losses, each)
    assert losses.shape == labels.shape and not losses[labels == IGNORE].any()
    torch.testing.assert_close(losses.sum(), cross_entropy_sum(hidden, head, labels).detach())


@pytest.mark.parametrize("depth", [1, 2])
def test_depth_k_is_asked_for_the_label_k_places_on(depth):
    labels = torch.tensor([[10, 11, IGNORE, 13, 14], [20, 21, 22, 23, 24]])
    ahead = labels_ahead({"labels": labels}, depth)
    want = {1: [[11, IGNORE, 13, 14, IGNORE], [21, 22, 23, 24, IGNORE]]}
    want[2] = [[IGNORE, 13, 14, IGNORE, IGNORE], [22, 23, 24, IGNORE, IGNORE]]
    assert ahead.tolist() == want[depth]


@pytest.mark.parametrize("depth", [1, 2])
def test_no_label_ahead_comes_from_another_segment(depth):
    labels = torch.arange(7)[None]
    ahead = labels_ahead({"labels": labels, "segment_ids": torch.tensor([[0, 0, 0, 1, 1, 1, -1]])}, depth)
    none = IGNORE
    want = {1: [1, 2, none, 4, 5, none, none], 2: [2, none, none, 5, none, none, none]}
    assert ahead.tolist() == [want[depth]]


def text_batch(rows: int = 4, time: int = 16) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCAB, (rows, time + 1))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def chat_batch() -> dict[str, torch.Tensor]:
    """Two packed rows with padding, in which some labels do not count."""
    segments = torch.tensor([[0] * 5 + [1] * 7 + [-1] * 4, [0] * 14 + [-1] * 2])
    positions = torch.tensor([[*range(5), *range(7), *range(4)], [*range(14), *range(2)]])
    batch = text_batch(2)
    batch["labels"] = batch["labels"].masked_fill((torch.rand(2, 16) < 0.4) | (segments < 0), IGNORE)
    return {**batch, "segment_ids": segments, "position_ids": positions}


@pytest.mark.parametrize("batch", [text_batch, chat_batch])
def test_the_total_is_main_plus_weighted_mtp_plus_weighted_balance(batch, tiny_model):
    model, batch = tiny_model(num_nextn_predict_layers=2), batch()
    total, count, metrics = NextTokenLoss(mtp_weight=0.3, balance_weight=0.02)(model, batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    out = model(**inputs, mtp=True)
    main = reference(out.hidden, out.head, batch["labels"])
    mtp = [reference(out.mtp_hidden[k - 1], out.head, labels_ahead(batch, k)) for k in (1, 2)]
    real = (batch["segment_ids"] >= 0).sum(1) if "segment_ids" in batch else 16
    labels = (batch["labels"] != IGNORE).sum()
    balance = (out.balance_loss / real * (batch["labels"] != IGNORE).sum(1)).sum()
    torch.testing.assert_close(total, main + 0.3 / 2 * sum(mtp) + 0.02 * balance)
    assert count == labels
    torch.testing.assert_close(metrics["main"], main.detach())
    torch.testing.assert_close(metrics["mtp"], sum(mtp).detach() / 2)
    torch.testing.assert_close(metrics["balance"], balance.detach() / 4)  # two MoE layers and two MTP layers
    torch.testing.assert_close(metrics["counts"], out.counts)


def test_without_the_chain_the_total_has_no_part_of_it(tiny_model):
    model, batch = tiny_model(), text_batch()
    total, _, metrics = NextTokenLoss(mtp=False, balance_weight=0.0)(model, batch)
    torch.testing.assert_close(total, metrics["main"])
    assert "mtp" not in metrics


def test_while_its_weight_is_0_the_chain_does_not_run(tiny_model):
    model, batch = tiny_model(), text_batch()
    total, _, metrics = NextTokenLoss(mtp_weight=0.0)(model, batch)
    total.backward()
    assert "mtp" not in metrics and len(metrics["counts"]) == 2
    assert all(p.grad is None for p in model.mtp.parameters())
    assert all(p.grad is not None for p in model.model.parameters())


def test_a_model_without_experts_has_no_balance_loss(tiny_model):
    total, _, metrics = NextTokenLoss(mtp=False)(tiny_model(first_k_dense_replace=3), text_batch())
    torch.testing.assert_close(total, metrics["main"])
    assert set(metrics) == {"main"}


def test_micro_batches_add_up_to_the_whole_batch(tiny_model):
    model, batch, loss = tiny_model(), text_batch(rows=6), NextTokenLoss(balance_weight=0.1)
    whole = loss(model, batch)
    parts = [loss(model, {name: value[rows] for name, value in batch.items()}) for rows in ([0], [1, 2], [3, 4, 5])]
    torch.testing.assert_close(whole[0], sum(part[0] for part in parts))
    assert whole[1] == sum(part[1] for part in parts)
    for name in ("main", "mtp", "balance", "counts"):
        torch.testing.assert_close(whole[2][name], sum(part[2][name] for part in parts))


@pytest.mark.parametrize("padding", ["none", "all"])
def test_a_batch_with_nothing_to_learn_gives_zero_and_finite_gradients(padding, tiny_model):
    """Trap 16: a mean over no labels would be NaN, and would poison every weight."""
    model, batch = tiny_model(), text_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    if padding == "all":
        batch["segment_ids"] = torch.full_like(batch["labels"], -1)
    total, count, metrics = NextTokenLoss(balance_weight=1.0)(model, batch)
    total.backward()
    assert total.item() == 0 and count == 0
    assert all(torch.isfinite(value).all() for value in metrics.values())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("rows", [0, 1, training.losses.ROWS, 1000, 12345])
@pytest.mark.parametrize("vocab", [50, 6400, 129280])
def test_chunks_cover_all_rows_in_whole_blocks(rows, vocab):
    parts = training.losses.chunks(torch.empty(rows, 0), vocab)
    assert [place for part in parts for place in range(part.start, part.stop)] == list(range(rows))
    assert all((part.stop - part.start) % training.losses.ROWS == 0 for part in parts[:-1])
    assert all(
        (part.stop - part.start) * vocab <= max(training.losses.CHUNK_ELEMENTS, training.losses.ROWS * vocab)
        for part in parts
    )


class Calls(TorchDispatchMode):
    """Notes what makes or changes tensors: about the launches of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        name = str(function)
        if not function.is_view and not name.startswith(("prim", "aten.empty", "aten.new_empty", "aten.detach")):
            self.names.append(name)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_a_batch_meets_the_vocabulary_in_one_chunk_and_few_launches(dtype, on_cuda):
    with FakeTensorMode():
        hidden = torch.empty(64, 512, 512, dtype=dtype, requires_grad=True)
        head, labels = torch.empty(6400, 512, requires_grad=True), torch.zeros(64, 512, dtype=torch.long)
        with Calls() as calls:
            cross_entropy_sum(hidden, head, labels).backward()
    products = [name for name in calls.names if "mm" in name]
    assert len(products) == 3 and len(calls.names) <= 32, calls.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_on_cuda_are_those_of_a_cpu(dtype, monkeypatch):
    monkeypatch.setattr("training.log_probs.TOGETHER", 40)  # on a CPU rows come in parts
    hidden, head, labels = problem()
    states, weights, found = hidden.detach().to(dtype).requires_grad_(), torch.randn_like(head[..., 0]), []
    for on in (False, True):
        monkeypatch.setattr(kernels, "on_cuda", lambda x, on=on: on)
        log_probs, entropy = log_probs_and_entropy(states, head, labels, 0.7)
        total = (log_probs.flatten()[: len(weights)] * weights).sum()
        found.append((log_probs, entropy, *torch.autograd.grad(total, (states, head))))
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_padding_goes_up_to_a_whole_block():
    for count in (0, 1, training.losses.ROWS - 1, training.losses.ROWS, training.losses.ROWS + 1):
        places = torch.arange(5, 5 + count)
        rows = training.losses.padded(places)
        assert len(rows) % training.losses.ROWS == 0 and len(rows) - count < training.losses.ROWS
        assert torch.equal(rows[:count], places) and not rows[count:].any()
    x = torch.ones(3, 2)
    assert torch.equal(training.losses.padded_rows(x, 5), torch.cat((x, torch.zeros(2, 2))))


@pytest.mark.parametrize("what", ["log-probabilities", "distillation"])
def test_any_number_of_labels_meets_the_vocabulary_in_few_row_counts(what, monkeypatch):
    """Each new count would cost a CPU kernels: 10 ms and 10 MB."""
    monkeypatch.setattr(training.losses, "CHUNK_ELEMENTS", 2 * training.losses.ROWS * VOCAB)
    head, seen = torch.randn(VOCAB, HIDDEN, requires_grad=True), set()
    products = torch.Tensor.__matmul__, torch.mm

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.update({tuple(a.shape), tuple(b.shape)})
        return products[0](a, b)

    def mm(a: torch.Tensor, b: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        seen.update({tuple(a.shape), tuple(b.shape)})
        return products[1](a, b, **options)

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    monkeypatch.setattr(torch, "mm", mm)
    for count in range(1, 200, 13):
        hidden = torch.randn(1, 220, HIDDEN, requires_grad=True)
        labels = torch.full((1, 220), -100)
        labels[0, :count] = torch.randint(VOCAB, (count,))
        if what == "log-probabilities":
            log_probs_and_entropy(hidden, head, labels)[0].sum().backward()
        else:
            said = Logits(torch.randn(count, HIDDEN), torch.randn(VOCAB, HIDDEN))
            distillation_sum(hidden, head, labels, said, forward_kl, ce_weight=0.5)[0].backward()
    rows = {size for shape in seen for size in shape} - {VOCAB, HIDDEN}
    assert rows == {training.losses.ROWS, 2 * training.losses.ROWS}
