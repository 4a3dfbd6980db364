"""Ranks hold the same code, settings, data and weights, to the bit: compared before the first step and on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from model import MiniDeepSeek, kernels
from training.parallel.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("*.py", *(f"{folder}/**/*.{kind}" for folder in ("model", "training", "text") for kind in ("py", "c", "h")))
PART = 2**18  # numbers of a weight at a time: what lies between stays in a processor's cache
LARGE_PART = 2**24  # on a GPU, which has more to do between two launches
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element


def facts(settings: object, run: dict[str, Any], model: MiniDeepSeek) -> dict[str, Any]:
    """Return what must be the same on all ranks. settings: a dataclass; run: of which data in which order."""
    return {
        "settings": settings,
        "run": run,
        "model": model.config,
        "code": code_version(),
        "torch": torch.__version__,
        "weights": dict(zip(*listed(checksums(model)), strict=True)),
    }


def code_version() -> str:
    """Return a hash of this project's sources."""
    digest = xxhash.xxh3_64()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)}):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_facts(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Raise `UserError`, on the main rank, when a fact is not the same on all ranks."""
    everywhere = ranks.gather(flat(facts))
    first = everywhere[0]
    for rank, theirs in enumerate(everywhere):
        for name in sorted({*first, *theirs}):
            if first.get(name) != theirs.get(name):
                ranks.fail(
                    f"rank {rank} disagrees with rank 0: {name} = {theirs.get(name)!r}, not {first.get(name)!r}; "
                    "start all ranks with the same command, code and files"
                )


def check_weights(ranks: Ranks, model: MiniDeepSeek, step: int) -> None:
    """Raise `UserError`, on the main rank, when what is trained is not the same to the bit on all ranks."""
    everywhere = ranks.gather(dict(zip(*listed(checksums(model)), strict=True)))
    different = [
        (rank, name)
        for rank, theirs in enumerate(everywhere)
        for name in everywhere[0]
        if theirs.get(name, everywhere[0][name]) != everywhere[0][name]  # another stage has other weights
    ]
    if different:
        rank, name = different[0]
        ranks.fail(
            f"rank {rank} disagrees with rank 0 after step {step}: {name} is not the same "
            f"({len(different)} such tensors); its memory or its code is not to be trusted: use --resume without it"
        )


def listed(sums: Mapping[str, torch.Tensor]) -> tuple[list[str], list[int]]:
    """Return names and values, read at once."""
    return list(sums), torch.stack(list(sums.values())).tolist() if sums else []


def checksums(model: MiniDeepSeek) -> dict[str, torch.Tensor]:
    """Return `checksum` of every weight that is trained and whole, and of the router biases."""
    moving = {name: p for name, p in model.named_parameters() if p.requires_grad and not hasattr(p, "to_local")}
    moving |= {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return {name: checksum(t.detach()) for name, t in moving.items() if not t.is_meta}


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return int64: the bits of each number as an integer times a factor of its place, summed modulo 2^64."""
    bits = tensor.contiguous().view(BITS[tensor.element_size()]).flatten()
    size = LARGE_PART if kernels.on_cuda(tensor) else PART
    factors = 2 * torch.arange(min(len(bits), size), device=bits.device) + 1
    total, *others = [(part * factors[: len(part)]).sum() for part in bits.split(size)]
    for other in others:
        total = 31 * total + other
    return total


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings within settings as `outer.inner`."""
    out: dict[str, Any] = {}
    for name, value in facts.items():
        value = asdict(value) if is_dataclass(value) else value
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out
