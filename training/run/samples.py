"""What the model writes while it is trained: greedy beginnings of answers, on the console and in OUT/samples.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from errors import UserError, naming
from model import MiniDeepSeek
from model.decoding.generate import stream
from model.decoding.sampling import Sampling
from text.files import json_text
from text.tokenizer import Tokenizer
from training.losses import Batch
from training.machine import autocast
from training.parallel.ranks import Ranks
from training.run.log import TEXT, forget_after
from training.settings import SampleSettings

BUILT_IN = 2  # prompts where no file gives any
BEGINNING, LONGEST, NEW = 16, 256, 48  # tokens: of a text to continue, of a prompt at most, of what is written
TRIED = 64  # rows looked at for them
PATIENCE = 0.25  # share of --dist.timeout that the other ranks wait for all samples together


class Rows(Protocol):
    """A data set to take prompts from."""

    def __len__(self) -> int: ...

    def batch(self, indices: list[int]) -> Batch: ...


Prompts = Callable[[Tokenizer, list[str], Iterable[Batch]], list[list[int]]]


class Samples:
    """Greedy continuations of a few prompts, written by the main rank; they draw no random numbers.

    Args:
        every: steps between them, or 0. prompts: token ids, none empty. compiled: layers are, which suits no decoding.
    """

    def __init__(
        self, every: int, prompts: Sequence[list[int]], tokenizer: Tokenizer, out: Path, ranks: Ranks, compiled: bool
    ) -> None:
        self._every, self._prompts, self._tokenizer, self._ranks = every, prompts, tokenizer, ranks
        self._path, self._compiled = out / "samples.jsonl", compiled

    def begin(self, step: int) -> None:
        """Drop what is about to be written again: the samples of later steps."""
        if self._ranks.main:
            forget_after(self._path, step)

    def due(self, step: int, validated: bool, last: bool) -> bool:
        """Return whether they are to be written after this step."""
        return validated if not self._every else last or step % self._every == 0

    def write(self, model: MiniDeepSeek, step: int, show: Callable[[int, list[dict[str, Any]]], None]) -> None:
        """Write one line of JSON a prompt; `show` is given the step and all of them. Leaves the model in training."""
        if not self._ranks.main:
            return
        model.eval()
        rows = []
        end = time.monotonic() + PATIENCE * self._ranks.timeout
        eager = torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()
        # Under an adapter in float32 the frozen weights are in the type of the products.
        products = autocast(model.lm_head.weight.dtype, self._ranks.device)
        with naming(self._path), open(self._path, "a", encoding="utf8") as file, eager, products:
            for number, ids in enumerate(self._prompts):
                text = self._tokenizer.decode(self._continue(model, ids, end, number))
                rows.append({"step": step, "prompt": self._tokenizer.decode(ids), "text": text})
                file.write(json_text(rows[-1]) + "\n")
        model.train()
        self._ranks.watch.show("", 0, 0)
        show(step, rows)

    def _continue(self, model: MiniDeepSeek, ids: list[int], end: float, number: int) -> list[int]:
        """Return what follows prompt `number`; less of it after a signal, or past `end` on the monotonic clock."""
        new, stop, ids_BT = [], self._tokenizer.eos_id, torch.tensor([ids], device=self._ranks.device)
        for token in stream(model, ids_BT, NEW, Sampling(temperature=0), (stop,)):
            if token.item() == stop:
                break
            new.append(token.item())
            self._ranks.watch.show("writing samples", number + len(new) / NEW, len(self._prompts))
            if self._ranks.watch.asked or time.monotonic() > end:
                break
        return new


def open_samples(
    settings: SampleSettings, tokenizer: Tokenizer, ranks: Ranks, rows: Rows, validated: bool, prompts: Prompts
) -> Samples | None:
    """Return the samples of a stage; None where nobody asked for any and nothing is validated.

    rows: held out where some are, else those of training. prompts: makes token ids of `--sample_prompts`' lines, or of
    rows where no file is given. Raises `UserError` for a file that cannot be used.
    """
    if not (validated or settings.sample_every):
        return None
    lines, count = read_prompts(settings.sample_prompts), min(len(rows), TRIED)
    encoded = prompts(tokenizer, lines, (rows.batch([place * len(rows) // count]) for place in range(count)))
    for line, ids in zip(lines, encoded, strict=False):
        if len(ids) > LONGEST:
            what = f"{line[:TEXT]!r} is {len(ids)} tokens long, but {LONGEST} is the most"
            raise UserError(f"--sample_prompts {settings.sample_prompts}: {what}; shorten it")
    return Samples(
        settings.sample_every, encoded, tokenizer, Path(settings.out), ranks, settings.compiles(ranks.device)
    )


def read_prompts(file: str) -> list[str]:
    """Return the lines of a UTF-8 file that are not blank; nothing without a file."""
    if not file:
        return []
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--sample_prompts {file}: cannot be read ({error}); give a UTF-8 text file") from None
    if not lines:
        raise UserError(f"--sample_prompts {file}: empty; give one prompt a line")
    return lines


def text_samples(
    settings: SampleSettings, tokenizer: Tokenizer, ranks: Ranks, rows: Rows, validated: bool
) -> Samples | None:
    """Continuations of texts while the model is trained; see `open_samples`."""
    return open_samples(settings, tokenizer, ranks, rows, validated, text_prompts)


def text_prompts(tokenizer: Tokenizer, lines: list[str], rows: Iterable[Batch]) -> list[list[int]]:
    """Return texts to continue: the lines, or how documents begin in rows of pretraining; each after another's end."""
    if lines:
        return [[tokenizer.eos_id, *tokenizer.encode(line)][:LONGEST] for line in lines]
    return first_different(map(partial(_beginning, tokenizer.eos_id), rows))


def _beginning(eos_id: int, batch: Batch) -> list[int]:
    """Return the end of a document and how the next one begins; nothing where that is too short."""
    ids = batch["input_ids"][0].tolist()
    ids = ids[ids.index(eos_id) :] if eos_id in ids[:-1] else [eos_id, *ids]
    return [] if eos_id in ids[1 : BEGINNING + 1] else ids[: BEGINNING + 1]


def first_different(prompts: Iterable[list[int]]) -> list[list[int]]:
    """Return the first `BUILT_IN` prompts that are not empty and not like one before."""
    found: list[list[int]] = []
    for prompt in prompts:
        if prompt and prompt not in found:
            found.append(prompt)
        if len(found) == BUILT_IN:
            break
    return found
