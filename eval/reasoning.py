"""Accuracy and format of one or several checkpoints on the same held-out problems, side by side.

python eval/reasoning.py --ckpt out/r1/zero/final,out/r1/last/final --data arithmetic:1-2
"""

from __future__ import annotations

import json as js
from pathlib import Path
from typing import Any

import torch

from cli import call
from dataset import PromptDataset
from errors import UserError, check_least, command_line
from eval.score_files import table
from text.sources.registry import find_sources
from training.alignment.rewards import Rewards
from training.alignment.sampler import sample_groups, to_samples
from training.machine import choose_dtype
from training.parallel.ranks import Ranks
from training.startup import open_checkpoint

SHOWN = ("correct", "strict_format", "language")


def reasoning(
    ckpt: str,
    data: str,
    problems: int = 256,
    val_fraction: float = 0.02,
    max_new_tokens: int = 96,
    system: str = "",
    json: str = "",
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Greedy answers to problems that training held out, judged by the rewards of the project.

    Args:
        ckpt: checkpoint folders, separated by commas
        data: problems, as for grpo_train.py
        problems: how many, at most
        val_fraction: share of the problems of files that training held out
        max_new_tokens: most tokens of an answer
        system: system prompt before every question
        json: also write the rows to this file
        device: auto, cpu or cuda
        dtype: auto, bf16 or fp32
    """
    check_least(1, problems=problems, max_new_tokens=max_new_tokens)
    rows = [
        measure(folder, data, problems, val_fraction, max_new_tokens, system, device, dtype)
        for folder in filter(None, ckpt.split(","))
    ]
    header = ["checkpoint", "right", "strict format", "one language", "tokens"]
    cells = [[row["name"], *(f"{row[name]:.1%}" for name in SHOWN), f"{row['tokens']:.1f}"] for row in rows]
    print("\n".join([f"held-out problems of {data}", "", *table(cells, header)]))
    if json:
        Path(json).write_text(js.dumps(rows, indent=2) + "\n", encoding="utf8")


def measure(
    folder: str, data: str, problems: int, val_fraction: float, new: int, system: str, device: str, dtype: str
) -> dict[str, Any]:
    """Return the shares of right, well-formed and single-language answers, and their mean length in tokens."""
    place = Ranks.start(device).device
    model, tokenizer = open_checkpoint(folder)
    model = model.to(place, choose_dtype(dtype, place)).eval()
    longest = model.config.max_position_embeddings - new
    held_out = {"val_fraction": val_fraction, "val_problems": problems}
    prompts = PromptDataset(find_sources(data, kind="prompt"), tokenizer, longest, system=system, **held_out)
    if not prompts.validation:
        raise UserError(f"--data {data}: nothing is held out; raise --val_fraction")
    judge = Rewards.of(dict.fromkeys(SHOWN, 1.0))
    asked = prompts.validation
    unused = torch.zeros(len(asked), 1, new)  # greedy answers need no random numbers
    made = list(sample_groups(model, prompts.encode(asked), unused, tokenizer.eos_id, temperature=0.0))
    samples = to_samples(tokenizer, asked, made)
    means = {name: sum(values) / len(asked) for name, values in judge(samples)[1].items()}
    return {"name": folder, **means, "tokens": sum(sample.tokens for sample in samples) / len(asked)}


if __name__ == "__main__":
    command_line(lambda: call(reasoning, __doc__ or ""))
