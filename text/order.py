"""Orders of samples that are pure functions of a seed: no state to save, the same on every machine and for ever.

numpy's generators would do for shuffling, but they hold the whole permutation in memory, and their streams may change
from one version to the next, which would break the exact resume of a run. Beside them, what all batches share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

IGNORED_LABEL = -100
PADDING_SEGMENT = -1
# Tokens of a row where nobody says how many; of each side of a pair; of a row of GRPO, those that the answer may take.
ROW_TOKENS, PAIR_TOKENS, ANSWER_TOKENS = 512, 1024, 256

WORD = (1 << 64) - 1
ROUNDS = 6
BLOCK = 4096


def content_hash(parts: Iterable[object]) -> str:
    """Return 12 hex digits, equal for equal numbers, texts and tuples in one order; a resumed run compares them."""
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        digest.update(repr(part).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def scramble(*values: int) -> int:
    """Return 64 bits that look random, from whole numbers (splitmix64's finaliser, Steele et al. 2014)."""
    state = 0
    for value in values:
        state = (state + (value & WORD) + 0x9E3779B97F4A7C15) & WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
        state ^= state >> 31
    return state


def shuffled(place: int, size: int, *key: int) -> int:
    """Return what stands at a place of a permutation of range(size) that `key` picks.

    A Feistel network permutes the next power of four; a value outside the range is put through again until it is
    inside (cycle walking, Black and Rogaway 2002), at most four times on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [scramble(*key, turn) for turn in range(ROUNDS)]
    while True:
        left, right = place >> half, place & mask
        for turn_key in keys:
            left, right = right, left ^ (scramble(turn_key, right) & mask)
        place = left << half | right
        if place < size:
            return place


def block_shares(weights: Sequence[float]) -> list[int]:
    """Return how many of `BLOCK` samples in a row each source gives: its share rounded, at least one; they add up."""
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    shares = [max(1, int(share)) for share in exact]
    while (rest := BLOCK - sum(shares)) != 0:
        step = 1 if rest > 0 else -1
        open_to_change = [number for number, share in enumerate(shares) if share + step >= 1]
        shares[max(open_to_change, key=lambda number: step * (exact[number] - shares[number]))] += step
    return shares


def mixed(index: int, shares: Sequence[int], *key: int) -> tuple[int, int]:
    """Return (source, number of the sample among that source's own) of sample `index` of an endless mixture.

    Every run of `BLOCK` samples, counted from 0, has exactly the shares, in an order of its own; of one source all are.
    """
    if len(shares) == 1:
        return 0, index
    block, place = divmod(index, sum(shares))
    slot = shuffled(place, sum(shares), *key, block)
    for source, share in enumerate(shares):
        if slot < share:
            return source, block * share + slot
        slot -= share
    raise AssertionError("shares add up to the block")
