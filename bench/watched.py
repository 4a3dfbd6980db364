"""A training program as it is, watched from inside its process: its weights at given moments, then scored.

Started by race.py with the description of one contender. Nothing of the program is changed: a hook that runs before
each forward pass of the network reads the clock and keeps the weights when a moment has come. The clock starts with the
first pass and stands still while weights are written, so what counts is training: no start, no tokenizing beforehand,
no scoring. It imports nothing of this project, so that the program finds its own modules.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

ROWS = 8  # a pass while scoring


class TimeIsUp(BaseException):
    """Ends a program that knows no minutes. Not an Exception, so that nothing catches it on the way."""


class Watch:
    """Keeps the weights of the first network that runs, at these seconds of training; the last one ends the program."""

    def __init__(self, moments: list[float], folder: Path) -> None:
        self.moments, self.folder = moments, folder
        self.moments_kept: list[float] = []
        self.model: nn.Module | None = None
        self._handle = register_module_forward_pre_hook(self._first_pass)

    def close(self) -> None:
        """Keep the last weights of a program that ended by itself."""
        if self.moments_kept[-1] < self.moments[-1]:
            self._keep(min(self._seconds(), self.moments[-1]))

    def weights(self, seconds: float) -> dict[str, Tensor]:
        """Return what was kept at one of `moments_kept`, and delete the file."""
        weights = torch.load(self._file(seconds), weights_only=True, map_location="cpu")
        self._file(seconds).unlink()
        return weights

    def _first_pass(self, module: nn.Module, inputs: object) -> None:
        self._handle.remove()
        self.model = module
        module.register_forward_pre_hook(self._before_pass)
        self._start = time.perf_counter()
        self._keep(0.0)

    def _before_pass(self, module: nn.Module, inputs: object) -> None:
        due = [moment for moment in self.moments if self.moments_kept[-1] < moment <= self._seconds()]
        if due and module.training:
            self._keep(self._seconds())
            if due[-1] == self.moments[-1]:
                raise TimeIsUp

    def _keep(self, seconds: float) -> None:
        begin = time.perf_counter()
        torch.save(self.model.state_dict(), self._file(seconds))
        self.moments_kept.append(seconds)
        self._start += time.perf_counter() - begin

    def _seconds(self) -> float:
        """Of training so far."""
        return time.perf_counter() - self._start

    def _file(self, seconds: float) -> Path:
        return self.folder / f"{seconds:.3f}.pt"


def main() -> None:
    contender = json.loads(Path(sys.argv[1]).read_text(encoding="utf8"))
    folder = Path(sys.argv[1]).parent
    held_out = Path(contender["held_out"]).read_text(encoding="utf8").split("\n")
    texts = [json.loads(line)["text"] for line in held_out if line]
    watch = Watch(contender["moments"], folder)
    os.chdir(contender["folder"])
    sys.argv = [contender["program"], *contender["arguments"]]
    try:
        runpy.run_path(contender["program"], run_name="__main__")
    except TimeIsUp:
        pass
    except SystemExit as end:
        if end.code:
            raise
    if watch.model is None:
        raise SystemExit(f"error: {contender['program']}: ended before its first step")
    watch.close()
    torch.set_num_threads(contender["threads"])
    rows = rows_of(texts, encoder(contender["tokenizer"], contender["begin"]), contender["window"])
    points = []
    for seconds in watch.moments_kept:
        watch.model.load_state_dict(watch.weights(seconds))
        points.append({"seconds": seconds, "bits_per_byte": bits_per_byte(watch.model, rows, texts)})
    result = {"parameters": sum(p.numel() for p in watch.model.parameters()), "points": points}
    (folder / "result.json").write_text(json.dumps(result, ensure_ascii=False, indent=2), encoding="utf8")


def encoder(folder: str, begin: str) -> Callable[[str], list[int]]:
    """Return what encodes a document, its begin (`bos` or `eos`: the end of another one) and its end included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, last = getattr(tokenizer, f"{begin}_token_id"), tokenizer.eos_token_id
    return lambda text: [first, *tokenizer.encode(text, add_special_tokens=False), last]


def rows_of(texts: Iterable[str], encode: Callable[[str], list[int]], window: int) -> list[tuple[list[int], int]]:
    """Return (tokens, number of the first that is scored), at most `window` inputs each: every token once.

    A longer document continues in another row, which repeats half a window as context.
    """
    rows = []
    for text in texts:
        ids, scored = encode(text), 1
        while scored < len(ids):
            start = 0 if scored == 1 else scored - window // 2
            end = min(start + window + 1, len(ids))
            rows.append((ids[start:end], scored - start))
            scored = end
    return sorted(rows, key=lambda row: len(row[0]))


@torch.inference_mode()
def bits_per_byte(model: nn.Module, rows: list[tuple[list[int], int]], texts: list[str]) -> float:
    """-log2 p of each document and its end, given its begin alone, over the bytes of all in UTF-8; in float32."""
    model.eval()
    device, nats = next(model.parameters(), torch.empty(0)).device, 0.0
    for first in range(0, len(rows), ROWS):
        part = rows[first : first + ROWS]
        shape = len(part), max(len(ids) for ids, _ in part) - 1
        inputs, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        for row, (ids, scored) in enumerate(part):  # padding is on the right, where no token sees it
            inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
            labels[row, scored - 1 : len(ids) - 1] = torch.tensor(ids[scored:])
        logits = model(inputs.to(device)).logits.float().flatten(0, 1)
        nats += F.cross_entropy(logits, labels.flatten().to(device), ignore_index=-100, reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode("utf8")) for text in texts)


if __name__ == "__main__":
    main()
