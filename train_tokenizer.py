"""Train the byte-level BPE tokenizer on a corpus.

    python train_tokenizer.py --data corpus.csv --out out/tokenizer

writes tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` opens, and prints how far the
tokenizer shortens Chinese, English, digits and code.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from cli import call
from errors import UserError, command_line, folded, waiting
from text.corpus.compression import Compression, measure_compression
from text.corpus.corpus import Corpus
from text.files import peak_memory
from text.sources.registry import REGISTRY, find_sources
from text.sources.row_report import balance
from text.tokenizer_training import Sample, check_vocab_size, sample_by_size, train_bpe

HELD_OUT_EVERY = 100


def train_tokenizer(
    data: str,
    out: str,
    vocab_size: int = 6400,
    column: str | None = None,
    sample_mb: float = 32.0,
    min_frequency: int = 2,
    max_token_bytes: int = 15,
    seed: int = 0,
    on_error: Literal["skip", "stop"] = "skip",
    encoding: str = "utf-8",
    datasets: str = REGISTRY,
) -> None:
    """Train a byte-level BPE tokenizer of exactly `vocab_size` tokens; the same data give the same files.

    Args:
        data: names in --datasets, files, folders or Hub names, separated by commas: csv, jsonl, json, parquet,
            arrow, txt
        out: folder for tokenizer.json and tokenizer_config.json
        vocab_size: number of tokens, special tokens and bytes included; at most 65535
        column: the column or field that holds the text (default: text)
        sample_mb: train on this much of the corpus, spread over all of it; training takes about 45 times as much
            memory
        min_frequency: join two tokens only if they are met together this often
        max_token_bytes: the longest token; 15 bytes are five Chinese characters
        seed: of the sample
        on_error: skip (count and report) or stop at rows that cannot be read
        encoding: of text files, for example gb18030
        datasets: YAML file that gives data sets names
    """
    check_vocab_size(vocab_size)
    if sample_mb <= 0:
        raise UserError(f"--sample_mb {sample_mb}: must be above 0")
    corpus = Corpus(find_sources(data, datasets, "text"), column, on_error, encoding)
    shown = sys.stderr.isatty()
    with waiting(f"reading {data}", not shown):
        sample = read_sample(corpus, int(sample_mb * 1e6), seed)
    held_out = sample.texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    del sample.texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    print(
        f"{sample.documents_seen:,} documents, {sample.size_seen / 1e6:.1f} MB; a sample of {sample.size / 1e6:.1f} MB"
    )
    for line in [*corpus.report.unread, *corpus.report.problem_lines()]:
        print(line)
    fates = {"to train on": len(sample.texts), "held out": len(held_out)}
    fates["beyond --sample_mb"] = sample.documents_seen - sum(fates.values())
    print(balance(corpus.report.rows, "documents", {**fates, **corpus.report.unused_by_kind}))

    begin = time.perf_counter()
    with waiting("counting pairs and merging them, a minute or two for 30 MB", not shown):
        tokenizer = train_bpe(sample.texts, vocab_size, min_frequency, max_token_bytes, progress=shown)
    seconds = time.perf_counter() - begin
    tokenizer.save(out)

    print(
        f"trained in {seconds:.1f} s, {sample.size / 1e6 / seconds:.2f} MB/s, peak memory {peak_memory() / 1e6:,.0f} MB"
    )
    print_table(measure_compression(tokenizer, held_out))
    if held_out:
        kinds = "each is of one kind (mixed: of several, or short), and all is their sum"
        print(folded(f"held out: the lines of {len(held_out)} documents that were not trained on; {kinds}"))
    print(f"{tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}: {Path(out) / 'tokenizer.json'}")


def read_sample(corpus: Corpus, size: int, seed: int) -> Sample:
    """Return texts of at most `size` bytes from the whole corpus, with a progress bar over its files."""
    total, shown = corpus.size or None, sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", leave=False, disable=not shown) as bar:

        def texts() -> Iterator[str]:
            for document in corpus:
                bar.update(corpus.report.bytes_read - bar.n)
                yield document.text

        return sample_by_size(texts(), size, seed)


def print_table(rows: list[Compression]) -> None:
    """Print characters and bytes a token, by kind of text."""
    table = Table("text", "source", "characters", "characters/token", "bytes/token")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        per_token = (f"{row.characters / row.tokens:.2f}", f"{row.bytes / row.tokens:.2f}")
        table.add_row(row.kind, row.source, f"{row.characters:,}", *per_token)
    Console().print(table)


if __name__ == "__main__":
    command_line(lambda: call(train_tokenizer, __doc__ or ""))
