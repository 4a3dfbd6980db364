"""Products with the vocabulary, in chunks of positions: the logits of a batch never exist together.

How many positions have a label changes from batch to batch, and for each row count that it has not seen before a CPU
generates kernels: up to 10 ms and 10 MB. So chunks, and what is left at the end, are whole numbers of `ROWS`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2**22  # logits held at a time
ROWS = 64


def chunks(rows: int, vocab: int) -> list[slice]:
    """Slices of so many positions."""
    size = max(ROWS, CHUNK_ELEMENTS // vocab // ROWS * ROWS)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def padded(places: Tensor) -> Tensor:
    """(N,) indices, followed by zeros up to a whole number of `ROWS`."""
    return F.pad(places, (0, -len(places) % ROWS))


def padded_rows(x: Tensor, rows: int) -> Tensor:
    """(N, ...) with rows of zeros behind, up to (rows, ...)."""
    return F.pad(x, (0, 0, 0, rows - len(x)))
