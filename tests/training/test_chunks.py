"""Row counts of products with the vocabulary: few, whatever the number of labels."""

from __future__ import annotations

import pytest
import torch

import training.losses
from training.distill.distillation import Logits, distillation_sum
from training.distill.divergences import forward_kl
from training.log_probs import log_probs_and_entropy
from training.losses import ROWS, chunks, padded, padded_rows

VOCAB, WIDTH = 50, 8


@pytest.mark.parametrize("rows", [0, 1, ROWS, 1000, 12345])
@pytest.mark.parametrize("vocab", [50, 6400, 129280])
def test_chunks_cover_all_rows_in_whole_blocks(rows, vocab):
    parts = chunks(rows, vocab)
    assert [place for part in parts for place in range(part.start, part.stop)] == list(range(rows))
    assert all((part.stop - part.start) % ROWS == 0 for part in parts[:-1])
    assert all((part.stop - part.start) * vocab <= max(training.losses.CHUNK_ELEMENTS, ROWS * vocab) for part in parts)


def test_padding_goes_up_to_a_whole_block():
    for count in (0, 1, ROWS - 1, ROWS, ROWS + 1):
        places = torch.arange(5, 5 + count)
        rows = padded(places)
        assert len(rows) % ROWS == 0 and len(rows) - count < ROWS
        assert torch.equal(rows[:count], places) and not rows[count:].any()
    x = torch.ones(3, 2)
    assert torch.equal(padded_rows(x, 5), torch.cat((x, torch.zeros(2, 2))))


@pytest.mark.parametrize("what", ["log-probabilities", "distillation"])
def test_any_number_of_labels_meets_the_vocabulary_in_few_row_counts(what, monkeypatch):
    """Each new count would cost a CPU kernels: 10 ms and 10 MB."""
    monkeypatch.setattr(training.losses, "CHUNK_ELEMENTS", 2 * ROWS * VOCAB)
    head, seen = torch.randn(VOCAB, WIDTH, requires_grad=True), set()
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
        hidden = torch.randn(1, 220, WIDTH, requires_grad=True)
        labels = torch.full((1, 220), -100)
        labels[0, :count] = torch.randint(VOCAB, (count,))
        if what == "log-probabilities":
            log_probs_and_entropy(hidden, head, labels)[0].sum().backward()
        else:
            said = Logits(torch.randn(count, WIDTH), torch.randn(VOCAB, WIDTH))
            distillation_sum(hidden, head, labels, said, forward_kl, ce_weight=0.5)[0].backward()
    rows = {size for shape in seen for size in shape} - {VOCAB, WIDTH}
    assert rows == {ROWS, 2 * ROWS}
