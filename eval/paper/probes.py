"""What the claims need of trained models beyond their logs: accuracy, drafts, experts by domain, decoding speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from eval.answering import Answerer
from eval.experts import loads, specialisation
from eval.likelihood import padded
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.cache import LatentCache
from model.decoding.eager import EagerRunner
from model.decoding.generate import stream
from model.decoding.runner import runner_for
from model.decoding.sampling import GREEDY
from model.decoding.speculative import stream_speculative
from training.machine import choose_dtype

WINDOW, ROWS = 256, 32  # of the held-out text, in tokens; read at once
MOST = 65536  # tokens of it
PROMPT, NEW, PROMPTS = 24, 48, 24  # tokens of a prompt and after it, prompts of a domain
CHINESE, DIGITS = 0.3, 0.1  # shares of characters from which a document is of a domain


def domains(texts: Sequence[str]) -> dict[str, list[str]]:
    """Sort documents: those with many digits, Chinese ones, others."""
    sorted_: dict[str, list[str]] = {"numbers": [], "Chinese": [], "English and others": []}
    for text in texts:
        letters = [c for c in text if not c.isspace()] or [" "]
        if sum(c.isdigit() for c in letters) >= DIGITS * len(letters):
            sorted_["numbers"].append(text)
        elif sum("\u4e00" <= c <= "\u9fff" for c in letters) >= CHINESE * len(letters):
            sorted_["Chinese"].append(text)
        else:
            sorted_["English and others"].append(text)
    return {name: members for name, members in sorted_.items() if members}


@torch.inference_mode()
def accuracy(answerer: Answerer, texts: Sequence[str]) -> float:
    """Return the share of tokens of the texts that are the model's likeliest."""
    tokenizer, line = answerer.tokenizer, []
    for text in texts:
        line += [tokenizer.eos_id, *tokenizer.encode(text)]
    line = line[:MOST]
    windows = [line[start : start + WINDOW] for start in range(0, len(line) - 1, WINDOW)]
    right = total = 0
    for start in range(0, len(windows), ROWS):
        part = windows[start : start + ROWS]
        ids = padded(part, max(map(len, part)), tokenizer.pad_id).to(answerer.device)
        there = padded([[1] * len(row) for row in part], ids.shape[1], 0).to(answerer.device)[:, 1:].bool()
        choice = answerer.model(ids).logits[:, :-1].argmax(-1)
        right += int(((choice == ids[:, 1:]) & there).sum())
        total += int(there.sum())
    return right / total


class Drafts(NamedTuple):
    """Of a domain: share of second tokens accepted, and how many tokens a second come with and without them."""

    accepted: float
    drafted_rate: float
    plain_rate: float


def drafts(answerer: Answerer, texts: Sequence[str]) -> Drafts:
    """Continue beginnings of texts greedily, by turns with one draft a pass and without."""
    model, drafted = answerer.model, []
    rates: dict[bool, list[float]] = {True: [], False: []}
    prompts = [ids for text in texts if len(ids := answerer.tokenizer.encode(text)) > PROMPT][:PROMPTS]
    for ids in prompts:
        prompt = torch.tensor([[answerer.tokenizer.eos_id, *ids[:PROMPT]]], device=answerer.device)
        for speculative in (True, False):
            began = time.perf_counter()
            if speculative:
                made = len(list(stream_speculative(model, prompt, NEW, (), drafted, 1, drafter=answerer.drafter)))
            else:
                made = len(list(stream(model, prompt, NEW, GREEDY)))
            rates[speculative].append(made / (time.perf_counter() - began))
    shares = sum(accepted for accepted, _ in drafted) / max(sum(count for _, count in drafted), 1)
    return Drafts(shares, median(rates[True]), median(rates[False]))


def expert_loads(answerer: Answerer, texts: dict[str, list[str]], tokens: int = 8192) -> dict[str, Tensor]:
    """Return the load of each expert of each MoE layer by domain."""
    return {name: loads(answerer, members, tokens) for name, members in texts.items()}


def apart(counts: dict[str, Tensor]) -> float:
    """Return how far the domains' experts are apart, mean over layers."""
    found = specialisation([*counts.values()])
    return sum(found) / len(found)


def decoding(
    configs: dict[str, LMConfig], lengths: Sequence[int], device: torch.device, fastest: bool = False,
    rounds: int = 5, steps: int = 8,
) -> dict[str, list[float]]:  # fmt: skip
    """Return tokens a second of one row after so many positions, by arm, in plain PyTorch or what is fastest here.

    Random weights and cache: neither changes the time. By turns, medians of `rounds`.
    """
    dtype, longest = choose_dtype("auto", device), max(lengths) + 2 * steps
    rates = {name: [] for name in configs}
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.inference_mode():
        runners = {}
        for name, config in configs.items():
            model = MiniDeepSeek(replace(config, max_position_embeddings=longest)).to(device, dtype).eval()
            cache = LatentCache(model.config, 1, longest, dtype, device)
            cache.latents.normal_()
            runners[name] = runner_for(model, cache) if fastest else EagerRunner(model, cache)
        for length in lengths:
            measured: dict[str, list[float]] = {name: [] for name in configs}
            for _ in range(rounds):
                for name, runner in runners.items():
                    runner.cache.lengths = [length] * len(runner.cache.lengths)
                    runner.step(ids)
                    began = time.perf_counter()
                    for _ in range(steps):
                        runner.step(ids)
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    measured[name].append(steps / (time.perf_counter() - began))
            for name, found in measured.items():
                rates[name].append(median(found))
    return rates


def cache_bytes(config: LMConfig) -> int:
    """Return bytes a token that the cache takes in bfloat16, all layers."""
    return 2 * config.num_hidden_layers * config.cache_width
