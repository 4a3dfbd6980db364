"""Token sequences of many samples in flat arrays, and which of them are held out. About three bytes a token."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np

from errors import UserError
from text.chats.packing import MixedEpochs
from text.sources.registry import Source, weights


class TokenRows:
    """Sequences of token ids with masks, 1 where the token is learnt.

    ids, mask: (tokens,) of all sequences in turn; begins: (sequences + 1,) where each begins; owners: (samples,) which
    of the `sources` a sample comes from, where a sample is one sequence or several; has_marks: whether some of the
    assistant's turns are marked as not trained on, so that the ids alone do not tell the mask.
    """

    has_marks = False

    def __init__(
        self, kept: Sequence[tuple[np.ndarray, np.ndarray]], owners: Sequence[int], sources: Sequence[Source]
    ) -> None:
        """kept: (ids, mask) of each sequence, at least one."""
        self.ids, self.mask = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        self.begins = np.cumsum([0, *(len(ids) for ids, _ in kept)])
        self.owners, self.sources = np.array(owners), sources

    @abstractmethod
    def positions(self, members: np.ndarray) -> np.ndarray:
        """How many positions of a row each of the samples `members` fills."""

    def packed(self, members: np.ndarray, capacity: int, seed: int, packing: bool = True) -> MixedEpochs:
        """Rows of the samples `members`, mixed where the sources have weights.

        Raises `UserError` for a source with a weight of which no sample is among them.
        """
        mixture, owners = weights(self.sources), self.owners[members]
        for number, source in enumerate(self.sources if mixture else []):
            if not (owners == number).any():
                raise UserError(f"{source}: nothing of it is left to train on; mend it or leave it out of the mixture")
        return MixedEpochs(members, owners, mixture, self.positions, capacity, seed, packing)

    def plain(self, members: np.ndarray, capacity: int, seed: int, packing: bool = True) -> MixedEpochs:
        """Rows of the samples `members`, each once an epoch, weights aside."""
        return MixedEpochs(members, self.owners[members], None, self.positions, capacity, seed, packing)

    def describe(self, members: Iterable[int]) -> str:
        """Where samples come from: the source, and which of its samples in use they are, counted from 1."""
        said = []
        for member in members:
            owner = self.owners[member]
            number = member - int(np.searchsorted(self.owners, owner)) + 1
            said.append(f"{self.sources[owner]} #{number}")
        return ", ".join(said)

    def identity(self, rows: MixedEpochs) -> str:
        """What the order of training depends on beside the seed: the samples and their shares of a mixture."""
        shares = ":".join(map(str, rows.shares))
        return f"{len(rows.members)} samples of {self.fingerprint[:12]}, shares {shares}"

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and mask, (tokens,) each."""
        span = slice(self.begins[number], self.begins[number + 1])
        return self.ids[span], self.mask[span]

    @property
    def fingerprint(self) -> str:
        """The same for the same sequences with the same masks in the same order."""
        digest = hashlib.blake2b(self.begins.astype("<i8").tobytes(), digest_size=16)
        digest.update(self.ids.astype("<u4").tobytes())
        if self.has_marks:
            digest.update(np.packbits(self.mask).tobytes())
        return digest.hexdigest()


def held_out(contents: Iterable[np.ndarray], size: int, fraction: float, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and indices held out, at least one of these unless `fraction` is 0, by a hash of the content.

    contents: token ids of `size` samples; what: their name in an error. Raises `UserError` when nothing is left.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"--val_fraction {fraction}: must be at least 0 and below 1")
    everything = np.arange(size)
    if fraction == 0:
        return everything, everything[:0]
    hashes = np.array([_hash(ids) for ids in contents])
    held = hashes < max(fraction, np.nextafter(hashes.min(), 1))
    if held.all():
        raise UserError(f"--val_fraction {fraction}: holds out all {size} {what}; add data or pass --val_fraction 0")
    return everything[~held], everything[held]


def _hash(ids: np.ndarray) -> float:
    """From 0 to 1, the same for the same tokens."""
    digest = hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
