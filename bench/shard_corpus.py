"""How fast a corpus becomes shards, in how much memory, and how that compares with the tokenizer alone.

    python bench/shard_corpus.py --megabytes 2000 --folder out/bench-shards

writes a CSV of that size with varied Chinese and English rows, then, interleaved, tokenises it to shards and runs
`tokenizers`' encode_batch on the same text in memory, each on all cores. Memory is that of the process and of the
largest of those that it started.
"""

from __future__ import annotations

import argparse
import csv
import resource
import shutil
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import harness
import numpy as np
import torch
from harness import MEMORY, Verdict

from text.corpus.corpus import Corpus
from text.corpus.shards import prepare_shards
from text.tokenizer import Tokenizer
from text.tokenizer_training import train_bpe

SPEED = "MB/s of text"
CHINESE_SHARE = 0.7
RAW_BATCH = 1000


def main() -> None:
    parser = harness.parser_of(__doc__, megabytes=2000, workers=0, raw_megabytes=200)
    parser.set_defaults(rounds=3, folder="out/bench-shards")
    parser.add_argument("--tokenizer", help="a folder; by default one of 6400 tokens is trained on the beginning")
    options = parser.parse_args()
    folder = Path(options.folder)
    file = folder / f"corpus-{options.megabytes}.csv"
    if options.worker:
        work(options, folder, file)
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_corpus(file, options.megabytes * 1_000_000)
    tokenizer = Tokenizer.from_folder(options.tokenizer) if options.tokenizer else None
    (tokenizer or train_bpe(list(beginning(file, 10_000_000)), 6400)).save(folder / "tokenizer")
    shards, alone = harness.measured({"shards": "shards", "encode_batch alone": "raw"}, options.rounds)
    title = f"{options.megabytes:,} MB of CSV to shards against encode_batch on {options.raw_megabytes:,} MB in memory"
    columns = {SPEED: "{:.2f}", MEMORY: "{:,.0f}"}
    verdicts = [Verdict.between(shards, alone, SPEED)]
    harness.report(f"{title}; medians of {options.rounds}", [shards, alone], columns, verdicts, {}, options.json)


def work(options: argparse.Namespace, folder: Path, file: Path) -> None:
    """Shard or encode, once for each line on stdin."""
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")

    def shard() -> int:
        shards = prepare_shards(str(file), tokenizer, folder / "shards", workers=options.workers)
        return sum(shards.split(name).bytes for name in ("train", "val"))

    if options.worker == "raw":
        texts = list(beginning(file, min(options.raw_megabytes, options.megabytes) * 1_000_000))

    def encode() -> int:
        for start in range(0, len(texts), RAW_BATCH):
            tokenizer.raw.encode_batch(texts[start : start + RAW_BATCH], add_special_tokens=False)
        return sum(len(text.encode()) for text in texts)

    def measure() -> dict[str, float]:
        shutil.rmtree(folder / "shards", ignore_errors=True)
        start = time.perf_counter()
        size = encode() if options.worker == "raw" else shard()
        started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        memory = harness.memory_mb(torch.device("cpu")) + started
        return {SPEED: size / 1e6 / (time.perf_counter() - start), MEMORY: memory}

    harness.serve(measure, torch.device("cpu"), warm_up=0)


def beginning(file: Path, size: int) -> Iterator[str]:
    """Yield the first texts of the corpus."""
    for document in Corpus(str(file)):
        size -= len(document.text.encode())
        yield document.text
        if size < 0:
            return


def write_corpus(file: Path, size: int) -> None:
    """Rows of 20 to 500 characters of words in a Zipf distribution, seven in ten Chinese, with digits and quotes."""
    generator = np.random.default_rng(0)
    chinese, english = chinese_words(generator, 40_000), english_words(generator, 20_000)
    temporary = file.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text"])
        while stream.buffer.tell() < size:
            writer.writerows([row] for row in rows(generator, chinese, english, 2000))
    temporary.rename(file)


def rows(generator: np.random.Generator, chinese: list[str], english: list[str], count: int) -> Iterator[str]:
    """Yield texts made of sentences."""
    for is_chinese in generator.random(count) < CHINESE_SHARE:
        words, mark, stop, gap = (chinese, "，", "。", "") if is_chinese else (english, ",", ".", " ")
        length = int(generator.integers(8, 160 if is_chinese else 80))
        text = [words[rank] for rank in zipf(generator, len(words), length).tolist()]
        for place in range(6, length, 7):
            text[place] += mark if place % 2 else stop
        if length % 5 == 0:
            text[length // 2] = f'"{length * 37}"'
        yield gap.join(text)


def zipf(generator: np.random.Generator, most: int, *shape: int) -> np.ndarray:
    """Ranks from 0 with P(rank) ~ 1 / rank."""
    return (most ** generator.random(shape)).astype(int) - 1


def chinese_words(generator: np.random.Generator, count: int) -> list[str]:
    """Return words of one to four of the 3500 first common ideographs."""
    ranks, order = zipf(generator, 3500, count, 4), generator.permutation(np.arange(0x4E00, 0x4E00 + 3500))
    return ["".join(map(chr, order[row[: 1 + number % 4]])) for number, row in enumerate(ranks)]


def english_words(generator: np.random.Generator, count: int) -> list[str]:
    """Pronounceable words of one to four syllables."""
    syllables = list(map("".join, product("bcdfglmnprst", "aeiou", ["", "n", "r", "s"])))
    chosen = generator.integers(0, len(syllables), (count, 4)).tolist()
    return ["".join(syllables[number] for number in row[: 1 + place % 4]) for place, row in enumerate(chosen)]


if __name__ == "__main__":
    main()
