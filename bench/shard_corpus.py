"""How fast a corpus becomes shards, in how much memory, and how that compares with the tokenizer alone.

    python bench/shard_corpus.py --megabytes 2000 --folder out/bench-shards

writes a CSV of that size with varied Chinese and English rows, tokenises it to shards in a process of its own, and
then, in turn, runs `tokenizers`' encode_batch on the same text in memory. Both use all cores. Memory is the sum of the
resident memory of the sharding process and its children, sampled 20 times a second; libraries that they share are
counted once for each, so the true figure is lower.
"""

from __future__ import annotations

import csv
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
from findings import Findings, Verdict
from tqdm import tqdm

from cli import call
from errors import command_line
from text.corpus.corpus import Corpus
from text.corpus.shards import prepare_shards
from text.tokenizer import Tokenizer
from text.tokenizer_training import train_bpe

CHINESE_SHARE = 0.7
RAW_BATCH = 1000
SPEED = "MB/s of text"


def shard_corpus(
    megabytes: int = 2000,
    folder: str = "out/bench-shards",
    tokenizer: str = "",
    workers: int = 0,
    raw_megabytes: int = 200,
    repeats: int = 3,
    json: str | None = None,
) -> None:
    """Measure sharding against encode_batch.

    Args:
        megabytes: size of the CSV, which is made once and used again
        folder: where the CSV and the shards go
        tokenizer: a tokenizer folder; by default one of 6400 tokens is trained on the CSV's beginning
        workers: tokenising threads; 0: all cores
        raw_megabytes: how much of the CSV encode_batch gets
        repeats: measure both so often, in turn
        json: write what was found to this file
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"corpus-{megabytes}.csv"
    if not file.exists():
        write_corpus(file, megabytes * 1_000_000)
    model = Tokenizer.from_folder(tokenizer) if tokenizer else train_bpe(list(beginning(file, 10_000_000)), 6400)
    model.save(place / "tokenizer")
    shards, alone = [], []
    for _ in range(repeats):
        shutil.rmtree(place / "shards", ignore_errors=True)
        seconds, size, peak = measured(make_shards, str(file), str(place / "tokenizer"), str(place / "shards"), workers)
        shards.append({SPEED: size / 1e6 / seconds, "memory_mb": peak / 2**20})
        raw = measured(encode_raw, str(file), str(place / "tokenizer"), min(raw_megabytes, megabytes) * 1_000_000)
        alone.append({SPEED: raw[1] / 1e6 / raw[0], "memory_mb": raw[2] / 2**20})
    title = f"{megabytes:,} MB of CSV to shards against encode_batch on {raw_megabytes:,} MB in memory"
    found = Findings(f"{title}; medians of {repeats}", {"shards": shards, "encode_batch": alone})
    speeds = ([result[SPEED] for result in results] for results in (shards, alone))
    found.verdicts = [Verdict.of(SPEED, "encode_batch alone", *speeds)]
    found.show({SPEED: "{:.2f}", "memory_mb": "{:,.0f}"})
    found.save(json)


def write_corpus(file: Path, size: int, seed: int = 0) -> None:
    """Rows of 20 to 500 characters of words in a Zipf distribution, seven in ten Chinese, with digits and quotes."""
    generator = np.random.default_rng(seed)
    chinese, english = chinese_words(generator, 40_000), english_words(generator, 20_000)
    temporary = file.with_suffix(".tmp")
    with (
        open(temporary, "w", encoding="utf-8", newline="") as stream,
        tqdm(total=size, unit="B", unit_scale=True) as bar,
    ):
        writer = csv.writer(stream)
        writer.writerow(["text"])
        while stream.buffer.tell() < size:
            bar.update(stream.buffer.tell() - bar.n)
            writer.writerows([row] for row in rows(generator, chinese, english, 2000))
    temporary.rename(file)


def rows(generator: np.random.Generator, chinese: list[str], english: list[str], count: int) -> Iterator[str]:
    """Texts made of sentences."""
    for is_chinese in generator.random(count) < CHINESE_SHARE:
        words, mark, gap = (chinese, "，", "") if is_chinese else (english, ",", " ")
        length = int(generator.integers(8, 160 if is_chinese else 80))
        ranks = (len(words) ** generator.random(length)).astype(int) - 1  # P(rank) ~ 1 / rank
        text = [words[rank] for rank in ranks.tolist()]
        for stop in range(6, length, 7):
            text[stop] += mark if stop % 2 else ("。" if is_chinese else ".")
        if length % 5 == 0:
            text[length // 2] = f'"{length * 37}"'
        yield gap.join(text)


def chinese_words(generator: np.random.Generator, count: int) -> list[str]:
    """Words of one to four of the 3500 first common ideographs, in a Zipf distribution too."""
    ranks = (3500 ** generator.random((count, 4))).astype(int) - 1
    order = generator.permutation(np.arange(0x4E00, 0x4E00 + 3500))
    return ["".join(map(chr, order[row[: 1 + number % 4]])) for number, row in enumerate(ranks)]


def english_words(generator: np.random.Generator, count: int) -> list[str]:
    """Pronounceable words of one to four syllables."""
    syllables = [first + vowel + last for first in "bcdfglmnprst" for vowel in "aeiou" for last in ["", "n", "r", "s"]]
    chosen = generator.integers(0, len(syllables), (count, 4)).tolist()
    return ["".join(syllables[number] for number in row[: 1 + place % 4]) for place, row in enumerate(chosen)]


def beginning(file: Path, size: int) -> Iterator[str]:
    """The first texts of the corpus."""
    for document in Corpus(str(file)):
        size -= len(document.text.encode())
        yield document.text
        if size < 0:
            return


def make_shards(answer: Connection, file: str, tokenizer: str, out: str, workers: int) -> None:
    """Shard the corpus; answers (seconds, bytes)."""
    model = Tokenizer.from_folder(tokenizer)
    begin = time.perf_counter()
    shards = prepare_shards(file, model, Path(out), workers=workers)
    answer.send((time.perf_counter() - begin, sum(shards.split(name).bytes for name in ("train", "val"))))


def encode_raw(answer: Connection, file: str, tokenizer: str, size: int) -> None:
    """Encode texts that are in memory already; answers (seconds, bytes)."""
    raw = Tokenizer.from_folder(tokenizer).raw
    texts = list(beginning(Path(file), size))
    begin = time.perf_counter()
    for start in range(0, len(texts), RAW_BATCH):
        raw.encode_batch(texts[start : start + RAW_BATCH], add_special_tokens=False)
    answer.send((time.perf_counter() - begin, sum(len(text.encode()) for text in texts)))


def measured(work: Callable[..., None], *arguments: object) -> tuple[float, int, int]:
    """Run `work` in a fresh process; (seconds, bytes, peak memory of it and its children in bytes)."""
    context = multiprocessing.get_context("spawn")
    answer, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender, *arguments))
    process.start()
    sender.close()
    watched, peak = psutil.Process(process.pid), 0
    while process.is_alive():
        with suppress(psutil.NoSuchProcess):
            peak = max(peak, sum(member.memory_info().rss for member in [watched, *watched.children(recursive=True)]))
        process.join(0.05)
    if process.exitcode:
        sys.exit(process.exitcode)
    return *answer.recv(), peak


if __name__ == "__main__":
    command_line(lambda: call(shard_corpus, __doc__ or ""))
