"""Groups of completions sampled from the policy: each prompt is read once, its group shares the latent cache.

The chance of every token comes from numbers drawn beforehand for its prompt, and is turned into a token by the inverse
of the cumulative distribution. So a completion is a function of the weights, the prompt and those numbers: not of the
batch it was sampled in, nor of the number of ranks, and a resumed run samples the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errors import UserError
from model import MiniDeepSeek
from model.cache import LatentCache, cache_dtype
from model.experts import Experts
from model.transformer import logits
from text.order import scramble
from text.tokenizer import Tokenizer

# CPU kernels are generated for each new shape (10 ms against 1 ms of work): prompts are padded to a multiple of this,
# and when completions have ended the batch shrinks to a power of two.
WIDTH = 8
COLD = 1e-4  # so low a temperature that the likeliest token is chosen


@dataclass(kw_only=True)
class RolloutSettings:
    """How completions are made and what becomes of them.

    Args:
        prompts: problems a step, over all ranks. group: completions of each, at least 2.
        max_new_tokens: most tokens of a completion.
        temperature: of the sampling.
        loss: grpo, dapo or dr_grpo.
        mu: optimiser steps on each batch of completions.
        resample: how often the prompts of groups without variance are replaced by others in a step (DAPO's dynamic
            sampling); what still has none is left out.
        overlong: keep or filter completions that were cut at the limit.
        rollout_rows: most completions sampled at a time on one rank.
    """

    prompts: int = 32
    group: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    loss: str = "grpo"
    mu: int = 1
    resample: int = 0
    overlong: str = "keep"
    rollout_rows: int = 512

    def check(self) -> None:
        """Raises `UserError` for a value that makes no sense."""
        for name in ("prompts", "max_new_tokens", "mu", "rollout_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.group < 2:
            raise UserError(f"--group {self.group}: a completion is compared with its group; give at least 2")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be above 0; greedy answers of a group are equal")
        if self.resample < 0:
            raise UserError(f"--resample {self.resample}: must be at least 0")
        if self.overlong not in ("keep", "filter"):
            raise UserError(f"--overlong {self.overlong}: one of keep, filter")


@dataclass
class Completions:
    """What was sampled, one row a completion; the completions of a prompt stand together.

    Attributes:
        tokens: (rows, new) int64, 0 after the end. lengths: (rows,) tokens of each, the end token included.
        log_probs: (rows, new) float32, the sampler's, 0 after the end.
        ended: (rows,) bool, False when cut at the limit.
    """

    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor
    ended: Tensor


@torch.no_grad()
def sample_completions(
    model: MiniDeepSeek,
    prompts: Sequence[Sequence[int]],
    chances: Tensor,
    stop: int,
    temperature: float = 1.0,
) -> Completions:
    """Sample a group of completions of each prompt at once.

    Args:
        prompts: token ids, none empty. chances: (prompts, group, new) float32 in [0, 1); `new` is the limit of tokens.
        stop: the token that ends a completion and belongs to it.
        temperature: above 0; the log-probabilities are those of the tempered distribution.
    """
    device = model.lm_head.weight.device
    count, group, new = chances.shape
    longest = -(-max(map(len, prompts)) // WIDTH) * WIDTH
    padding = torch.tensor([longest - len(ids) for ids in prompts], device=device)
    ids = torch.tensor([[stop] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    padded = padding if bool(padding.any()) else None
    cache = LatentCache(model.config, count, longest + new, cache_dtype(model), device, padded)
    hidden = model(ids, cache=cache).hidden[:, -1]
    # One prefill a prompt; then every completion has a row of its own.
    rows = torch.arange(count, device=device).repeat_interleave(group)
    cache.keep_rows(rows)
    hidden, chances = hidden[rows], chances.to(device).flatten(0, 1)

    running = torch.arange(count * group, device=device)  # which completion each row of the cache is
    alive = torch.ones_like(running, dtype=torch.bool)
    tokens = torch.zeros(count * group, new, dtype=torch.int64, device=device)
    log_probs = torch.zeros(count * group, new, device=device)
    lengths = torch.full_like(running, new)
    for step in range(new):
        p = (logits(hidden, model.lm_head.weight) / temperature).softmax(-1)
        chosen = inverse_cumulative(p, chances[running, step])
        tokens[running[alive], step] = chosen[alive]
        log_probs[running[alive], step] = p.gather(1, chosen.unsqueeze(1)).squeeze(1).log()[alive]
        ends = alive & (chosen == stop)
        lengths[running[ends]] = step + 1
        alive = alive & ~ends
        left = int(alive.sum())
        if left == 0 or step + 1 == new:
            break
        size = 1 << (left - 1).bit_length()
        if size < len(running):
            kept = alive.int().argsort(descending=True, stable=True)[:size]
            cache.keep_rows(kept)
            running, chosen, alive = running[kept], chosen[kept], alive[kept]
        hidden = model(chosen.unsqueeze(1), cache=cache).hidden[:, -1]
    ended = tokens.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1) == stop
    return Completions(tokens, lengths, log_probs, ended)


def inverse_cumulative(probabilities_BV: Tensor, chance_B: Tensor) -> Tensor:
    """The first token of each row whose cumulative probability exceeds the row's chance. (B,) int64."""
    cumulative = probabilities_BV.cumsum(-1)
    # Scaled by what the sum really is after rounding, a chance below 1 falls on a token of some probability.
    chance = (chance_B * cumulative[:, -1]).unsqueeze(1)
    chosen = torch.searchsorted(cumulative, chance, right=True).squeeze(1)
    if bool((chosen == probabilities_BV.shape[1]).any()):
        chosen = torch.where(chosen < probabilities_BV.shape[1], chosen, probabilities_BV.argmax(-1))
    return chosen


def chances(keys: Sequence[tuple[int, ...]], group: int, new: int) -> Tensor:
    """(prompts, group, new) uniform numbers, those of a prompt a function of its key alone."""
    drawn = []
    for key in keys:
        generator = torch.Generator().manual_seed(scramble(*key) >> 1)
        drawn.append(torch.rand(group, new, generator=generator))
    return torch.stack(drawn)


def completion_texts(tokenizer: Tokenizer, made: Completions) -> list[str]:
    """The completions' texts without the tokens that ended them; marks such as <think> are kept."""
    lengths = (made.lengths - made.ended.long()).tolist()
    return [
        tokenizer.decode(tokens[:length], skip_special_tokens=False)
        for tokens, length in zip(made.tokens.tolist(), lengths, strict=True)
    ]


class Sampler:
    """The policy in the type that it computes in. In bfloat16 a copy of the matrices, made anew for every rollout.

    Norms and routers keep their float32 weights, so that products are rounded where autocast rounds them in training.
    Sampler and trainer differ by the order of their sums, by the absorbed form of attention, and on CPU, where few rows
    are decoded in C (`model/native.py`), by numbers between the products and logits that are not rounded at all.
    """

    def __init__(self, model: MiniDeepSeek, dtype: torch.dtype) -> None:
        self.source = model
        self.model = model
        if dtype != torch.float32:
            self.model = copy.deepcopy(model).requires_grad_(False)
            for module in self.model.modules():
                if isinstance(module, (nn.Linear, nn.Embedding, Experts)):
                    module.to(dtype)
            self.model.eval()

    @torch.no_grad()
    def refresh(self) -> MiniDeepSeek:
        """The policy as it is now."""
        if self.model is not self.source:
            for mine, theirs in zip(self.model.state_dict().values(), self.source.state_dict().values(), strict=True):
                mine.copy_(theirs)
        return self.model
