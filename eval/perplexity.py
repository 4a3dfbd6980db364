"""Perplexity and bits per byte of a text file under a checkpoint.

python eval/perplexity.py --ckpt out/pretrain/final --file book.txt --json
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cli import call
from errors import UserError, check_least, command_line, tracked
from eval.answering import Answerer
from eval.likelihood import CacheScorer
from text.files import json_text

BLOCK = 2**20  # characters tokenised at a time


@dataclass(frozen=True)
class Score:
    """Attributes: nll in nats, summed over `tokens`; bytes of the text in UTF-8; bits_per_byte; perplexity a token."""

    nll: float
    tokens: int
    bytes: int
    bits_per_byte: float
    perplexity: float


def score_text(answerer: Answerer, blocks: Iterator[str], window: int = 0, batch: int = 8) -> Score:
    """Score every token once, with at least half a window of context (all there is at the beginning).

    Args:
        blocks: the text in pieces. window: tokens a pass; 0 means the model's context, at most 1024.
    """
    window = min(window or 1024, answerer.model.config.max_position_embeddings)
    scorer = CacheScorer(answerer)
    nats, tokens, size, pairs = 0.0, 0, 0, []
    # The text follows the end of another document, as in pretraining.
    line, scored = [answerer.tokenizer.eos_id], 1
    for block in [*blocks, None]:
        if block is not None:
            size += len(block.encode("utf8"))
            line += answerer.tokenizer.encode(block)
        while len(line) > window or (block is None and scored < len(line)):
            piece = line[: window + 1]
            pairs.append((piece[:scored], piece[scored:]))
            tokens += len(piece) - scored
            # The next window starts half a window on and scores what this one has not.
            step = max(len(piece) - 1 - window // 2, 1)
            scored = len(piece) - step
            line = line[step:]
            if len(pairs) == batch:
                nats, pairs = nats - sum(scorer.score_windows(pairs)), []
    nats -= sum(scorer.score_windows(pairs))
    return Score(nats, tokens, size, nats / math.log(2) / max(size, 1), math.exp(min(nats / max(tokens, 1), 700)))


def read_blocks(path: Path) -> Iterator[str]:
    """Yield the file in pieces that end at a line's end where there is one."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            while block := file.read(BLOCK):
                yield block + file.readline()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a text file") from None
    except UnicodeDecodeError as error:
        remedy = "convert it with iconv -f GB18030 -t UTF-8"
        if error.reason == "unexpected end of data":  # all before it is UTF-8
            remedy = "it ends within a character; cut it between two, as with head -n"
        raise UserError(f"{path}: not UTF-8 ({error.reason}); {remedy}") from None


def perplexity(
    ckpt: str,
    file: str,
    json: bool = False,
    window: int = 0,
    lora: str = "",
    quantize: str = "",
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Perplexity and bits per byte of a text file.

    Args:
        ckpt: checkpoint folder
        file: UTF-8 text
        json: print one JSON object instead of a sentence
        window: tokens a pass; 0 means the model's context, at most 1024
        lora: folder of an adapter that lora_sft.py made for this checkpoint
        quantize: int8 keeps the matrices of the layers in 8 bits; empty keeps them as they are
        device: auto, cpu or cuda
        dtype: auto, bf16 or fp32
    """
    check_least(0, window=window)
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a text file")
    answerer = Answerer.open(ckpt, device, dtype, lora, quantize)
    total = math.ceil(path.stat().st_size / BLOCK)
    score = score_text(answerer, tracked(read_blocks(path), "scoring, blocks of text", total), window)
    if not score.tokens:
        raise UserError(f"{path}: empty; give a file with text")
    if json:
        print(json_text(asdict(score)))
    else:
        print(
            f"{score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.2f} a token "
            f"({score.tokens:,} tokens, {score.bytes:,} bytes, {score.nll:,.1f} nats)"
        )


if __name__ == "__main__":
    command_line(lambda: call(perplexity, __doc__ or ""))
