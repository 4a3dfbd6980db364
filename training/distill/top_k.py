"""A teacher's distributions at every trained token, computed once and cached on disk: its top K tokens and the rest.

All other tokens together are one event, whose probability is stored too. So the loss is a divergence between
distributions over K + 1 events. It is never larger than the one over all tokens (the data-processing inequality) and
equal to it where K is the vocabulary. It says how much probability belongs to the rest, but not how to share it out.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from dataset import ChatDataset
from errors import tracked
from text.chats.encoded import EncodedChats
from text.chats.packing import write_row
from training.distill.distillation import Logits, Teacher
from training.distill.divergences import Divergence
from training.distill.on_policy import TaughtChats
from training.fingerprinted import open_arrays, save_arrays
from training.losses import Batch
from training.machine import autocast
from training.parallel.ranks import Ranks

FOLDER = "teacher_top_k"
CONVERSATIONS = 2048  # of a file
POSITIONS = 512  # whose logits are looked at together
IDS, LOG_PROBS, REST = "teacher_ids", "teacher_log_probs", "rest"


@dataclass(frozen=True)
class TopK:
    """The stored distributions at N labels.

    Attributes:
        ids: (N, K) int64. log_probs: (N, K + 1) float32, at the temperature of the run, the last that of all other
            tokens together; (N, K) where there are no others.
    """

    ids: Tensor
    log_probs: Tensor

    @classmethod
    def of_batch(cls, batch: Batch) -> TopK:
        """A `Teacher` that was asked before: read its distributions from the batch."""
        return cls(batch[IDS], batch[LOG_PROBS])

    def compare(self, part: slice, log_q_RV: Tensor, divergence: Divergence, temperature: float) -> tuple[Tensor, ...]:
        """Return the divergence between p and q over K + 1 events, and its flow over the vocabulary."""
        ids, log_p = self.ids[part], self.log_probs[part]
        log_q = log_q_RV.gather(1, ids)
        if log_p.shape[1] == ids.shape[1]:
            value, flow = divergence(log_p, log_q)
            return value, torch.zeros_like(log_q_RV).scatter_(1, ids, flow)
        # Summed over the others themselves: 1 - sum(top) would cancel.
        rest = log_q_RV.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        value, flow = divergence(log_p, torch.cat([log_q, rest], 1))
        # dD/dq is the same for each token of the rest, so each has its share q / q_rest of the flow.
        shares = (log_q_RV - rest).exp_().mul_(flow[:, -1:])
        return value, shares.scatter_(1, ids, flow[:, :-1])


class CachedTopKChats(TaughtChats):
    """A `ChatDataset` whose batches have the teacher's distributions: `teacher_ids`, `teacher_log_probs`.

    These are (N, K) and (N, K + 1), one row for each label that counts, in the order of `labels`.
    """

    def __init__(self, chats: ChatDataset, cache: TopKCache) -> None:
        super().__init__(chats)
        self.cache = cache

    def batch(self, indices: Sequence[int]) -> Batch:
        """`ChatDataset.batch`, and the teacher's distributions."""
        ids, log_probs = self.cache.read(member for index in indices for member in self.chats.members(index))
        return {**self.chats.batch(indices), IDS: ids, LOG_PROBS: log_probs}


class TopKCache:
    """The files of a folder, read where they are needed and never whole."""

    def __init__(self, files: Sequence[Path], chats: EncodedChats) -> None:
        self._files = [safe_open(file, "numpy") for file in files]
        # trained[t]: how many of the tokens before t are trained, so where the rows of a conversation begin
        trained = np.concatenate([[0], np.cumsum(chats.mask, dtype=np.int64)])
        self._rows = trained[chats.begins]
        self._begins = self._rows[np.arange(0, len(chats), CONVERSATIONS)].tolist()

    def read(self, members: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Return (N, K) ids and (N, K + 1) log-probabilities of the trained tokens of conversations."""
        parts = [self._read(int(self._rows[member]), int(self._rows[member + 1])) for member in members]
        ids, log_probs = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
        # 16 bits rounded them: normalised again.
        return ids, log_probs - log_probs.logsumexp(1, keepdim=True)

    def _read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        number = bisect_right(self._begins, begin) - 1
        file, span = self._files[number], slice(begin - self._begins[number], end - self._begins[number])
        top = file.get_slice(LOG_PROBS)[span].astype(np.float32)
        if REST in file.keys():  # noqa: SIM118 (no mapping)
            top = np.concatenate([top, file.get_slice(REST)[span][:, None]], 1)
        return file.get_slice(IDS)[span].astype(np.int64), top


def cache_top_k(
    folder: Path, chats: ChatDataset, k: int, temperature: float, fingerprint: str, ask: Callable[[], Teacher],
    micro_rows: int, dtype: torch.dtype, ranks: Ranks,
) -> TopKCache:  # fmt: skip
    """Ask the teacher about all conversations, unless files of the same fingerprint are there. Ranks share the work.

    Args:
        folder: of the files, on a disk that all ranks share. ask: opens the teacher, if it is needed at all.
        fingerprint: of teacher and data.
    """
    encoded = chats.chats
    files = [folder / f"part-{number:05d}.safetensors" for number in range(-(-len(encoded) // CONVERSATIONS))]
    ranks.check_writes_shared(folder)  # each rank reads what all have written
    missing = ranks.on_main(lambda: [n for n, file in enumerate(files) if open_arrays(file, fingerprint) is None])
    if missing:
        ranks.say(f"asking the teacher about {len(encoded)} conversations, once, into {folder}")
    if mine := missing[ranks.rank :: ranks.world]:
        parts = {n: range(n * CONVERSATIONS, min((n + 1) * CONVERSATIONS, len(encoded))) for n in mine}
        teacher, total = ask(), sum(map(len, parts.values()))
        members = tracked(chain(*parts.values()), "asking the teacher, conversations", total, ranks.main)
        for number, part in parts.items():
            rows = in_order(encoded, islice(members, len(part)), chats.sequence_length, chats.pad_id)
            arrays = joined(outputs(teacher, rows, micro_rows, dtype, ranks.device), k, temperature)
            save_arrays(files[number], arrays, fingerprint)
    ranks.gather(None)
    ranks.check_shared(folder, lambda: all(open_arrays(file, fingerprint) is not None for file in files))
    return TopKCache(files, encoded)


@torch.no_grad()
def outputs(
    teacher: Teacher, rows: Iterator[dict[str, np.ndarray]], micro_rows: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Logits]:
    """Yield what the teacher says of rows, `micro_rows` at a time."""
    while some := [row for _, row in zip(range(micro_rows), rows, strict=False)]:
        batch = {name: torch.from_numpy(np.stack([row[name] for row in some])).to(device) for name in some[0]}
        with autocast(dtype, device):
            output = teacher(batch)
        yield output


@torch.no_grad()
def joined(outputs: Iterable[Logits], k: int, temperature: float) -> dict[str, np.ndarray]:
    """Return the K most probable tokens of each position, the most probable first, as the arrays of a file.

    These are ids (N, K) of 16 or 32 bits, their log-probabilities float16, and that of the rest (N,) float32.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for output in outputs:
        for start in range(0, max(len(output.hidden), 1), POSITIONS):
            log_p = output.log_probs(slice(start, start + POSITIONS), temperature)
            top, ids = log_p.topk(min(k, log_p.shape[1]))
            kind = np.uint16 if log_p.shape[1] <= 1 << 16 else np.uint32
            arrays = {IDS: ids.cpu().numpy().astype(kind), LOG_PROBS: top.cpu().numpy().astype(np.float16)}
            if top.shape[1] < log_p.shape[1]:
                arrays[REST] = log_p.scatter(1, ids, -torch.inf).logsumexp(1).cpu().numpy()
            for name, values in arrays.items():
                parts.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


def in_order(
    chats: EncodedChats, members: Iterable[int], sequence_length: int, pad_id: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield rows of conversations one after the other, so that their labels stand in the order of `chats`."""
    some: list[tuple[np.ndarray, np.ndarray]] = []
    room = sequence_length
    for member in members:
        size = len(chats[member][0]) - 1
        if size > room:
            yield write_row(some, sequence_length, pad_id)
            some, room = [], sequence_length
        some.append(chats[member])
        room -= size
    if some:
        yield write_row(some, sequence_length, pad_id)


def fingerprint(chats: EncodedChats, *facts: object) -> str:
    """Return 16 hex digits of conversations and what is trained of them, and of the facts about teacher and run."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8)
    for array in (chats.ids, chats.mask, chats.begins):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
