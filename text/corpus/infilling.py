"""Fill in the middle (DeepSeek-V3 section 4.1): documents whose middle stands at the end, after what surrounds it."""

from __future__ import annotations

from dataclasses import dataclass

from text.order import WORD, scramble
from text.tokenizer import Tokenizer

KEY = 0x66696D  # keeps these random numbers apart from others of the same seed


@dataclass(frozen=True)
class Infilling:
    """Which documents are rearranged, and where they are cut: a function of the seed and the document's hash.

    Attributes: rate: share of the documents (0.1 in the paper); seed; spared: hashes below it are of held-out ones.
    """

    rate: float
    seed: int
    spared: int

    def takes(self, digest: int) -> bool:
        """Return whether a document of this hash is rearranged."""
        return digest >= self.spared and scramble(KEY, self.seed, digest) < self.rate * WORD

    def parts(self, text: str, digest: int) -> tuple[str, str, str]:
        """Cut a document between characters, each of its two places equally likely anywhere: before, middle, after."""
        places = [scramble(KEY, self.seed, digest, number) % (len(text) + 1) for number in (1, 2)]
        first, second = sorted(places)
        return text[:first], text[first:second], text[second:]

    def join(self, tokenizer: Tokenizer, before: list[int], middle: list[int], after: list[int]) -> list[int]:
        """Return the tokens of a document but for its end in the order PSM: prefix, suffix, middle."""
        return [*question(tokenizer, before, after), *middle]


def question(tokenizer: Tokenizer, before: list[int], after: list[int]) -> list[int]:
    """Return the prompt that a model which has learned from such documents continues with the middle."""
    prefix, suffix, middle = (tokenizer.special_ids[f"<|fim_{part}|>"] for part in ("prefix", "suffix", "middle"))
    return [prefix, *before, suffix, *after, middle]
