"""Byte-level BPE trained on a sample of the corpus that spreads over all of it."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from errors import UserError
from text.tokenizer import MAX_VOCAB_SIZE, SPECIAL_TOKENS, Tokenizer, characters

# Qwen2's splitting rule, which llama.cpp knows as "qwen2". A digit is a piece of its own (groups of three would burn a
# sixth of 6400 tokens), and no piece joins letters with a following '>' or '|': BPE can never build a special token.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


@dataclass
class Sample:
    """`texts` in the order of the corpus; sizes in UTF-8 bytes."""

    texts: list[str]
    size: int
    documents_seen: int
    size_seen: int


def sample_by_size(texts: Iterable[str], size: int, seed: int = 0) -> Sample:
    """Return whole texts of together at most `size` bytes, or the beginning of one text if that is longer.

    Each text draws a number, and the texts below a bar are taken; the bar is lowered whenever they grow too large. So
    every text has the same chance wherever it stands, and equal corpora and seeds give equal samples.
    """
    draw = random.Random(seed).random
    bar = 1.0
    taken: list[tuple[float, int, str, int]] = []  # a heap with the highest draw first
    total = size_seen = number = 0
    for number, text in enumerate(texts, start=1):
        length = len(text.encode("utf-8", "surrogatepass"))
        size_seen += length
        drawn = draw()
        if drawn >= bar:
            continue
        if length > size:
            text = text.encode("utf-8", "surrogatepass")[:size].decode("utf-8", "ignore")
            length = size
        heapq.heappush(taken, (-drawn, number, text, length))
        total += length
        while total > size:
            highest, _, _, removed = heapq.heappop(taken)
            bar = -highest
            total -= removed
    taken.sort(key=lambda entry: entry[1])
    return Sample([entry[2] for entry in taken], total, number, size_seen)


def check_vocab_size(vocab_size: int) -> None:
    """Raise `UserError` unless a tokenizer can have that many tokens."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"--vocab_size {vocab_size}: must be from {MIN_VOCAB_SIZE} (special tokens and bytes) "
            f"to {MAX_VOCAB_SIZE} (token shards hold 16 bits)"
        )


def train_bpe(
    texts: Iterable[str], vocab_size: int, min_frequency: int = 2, max_token_bytes: int = 15, progress: bool = False
) -> Tokenizer:
    """Train byte-level BPE of exactly `vocab_size` tokens; the same texts in the same order give the same tokenizer.

    `max_token_bytes` keeps a token to five Chinese characters or an English word: Chinese has no spaces, so a piece is
    a whole clause, and a sentence repeated on every page of a corpus would otherwise become one token, with each
    of its beginnings. Memory grows with the text, about 45 bytes a byte: long pieces are rarely met twice.
    Raises `UserError` when the texts are too few to make that many tokens.
    """
    check_vocab_size(vocab_size)
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=max_token_bytes + 1,  # tokenizers keeps what is shorter than this
        show_progress=progress,
    )
    raw.train_from_iterator((characters(text) for text in texts), trainer)
    made = raw.get_vocab_size()
    if made != vocab_size:
        raise UserError(
            f"the data gave only {made} of {vocab_size} tokens; add data, pass --vocab_size {made} or less, "
            "or pass --min_frequency 1"
        )
    return Tokenizer(raw)
