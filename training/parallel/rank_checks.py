"""Whether all ranks run the same code on the same settings, and hold the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from model import MiniDeepSeek
from training.parallel.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("*.py", *(f"{folder}/**/*.{kind}" for folder in ("model", "training", "text") for kind in ("py", "c", "h")))
PART = 2**18  # numbers of a weight at a time: what lies between stays in a processor's cache
# By the size of an element: what its bits are added up as.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def facts(settings: object, run: dict[str, Any], model: MiniDeepSeek) -> dict[str, Any]:
    """What must be the same on all ranks. settings: a dataclass; run: of which data in which order."""
    return {
        "settings": settings,
        "run": run,
        "model": model.config,
        "code": code_version(),
        "torch": torch.__version__,
        "weights": {name: value.item() for name, value in checksums(model).items()},
    }


def check_facts(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Raises `UserError`, on the main rank, when a fact is not the same on all ranks."""
    if ranks.world == 1:
        return
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
    """Raises `UserError`, on the main rank, when what is trained is not the same to the bit on all ranks."""
    if ranks.world == 1:
        return
    sums = checksums(model)
    everywhere = torch.stack(ranks.gather(torch.stack(list(sums.values())).cpu()))
    different = (everywhere != everywhere[0]).nonzero()
    if len(different):
        rank, place = different[0].tolist()
        ranks.fail(
            f"rank {rank} disagrees with rank 0 after step {step}: {list(sums)[place]} is not the same "
            f"({len(different)} such tensors); its memory or its code is not to be trusted: use --resume without it"
        )


def checksums(model: MiniDeepSeek) -> dict[str, torch.Tensor]:
    """Of every weight that is trained and of the router biases: `checksum`."""
    moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moving |= {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return {name: checksum(t.detach()) for name, t in moving.items()}


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """int64: the bits of each number as an integer times a factor of its place, summed without a look at overflow."""
    bits = tensor.contiguous().view(BITS[tensor.element_size()]).flatten()
    factors = 2 * torch.arange(min(len(bits), PART), device=bits.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.split(PART):
        total = 31 * total + (part * factors[: len(part)]).sum()
    return total


def code_version() -> str:
    """The same for the same sources of this project."""
    digest = xxhash.xxh3_64()
    for path in sorted({path for pattern in SOURCES for path in ROOT.glob(pattern)}):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings within settings as `outer.inner`."""
    out: dict[str, Any] = {}
    for name, value in facts.items():
        value = asdict(value) if is_dataclass(value) else value
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out
