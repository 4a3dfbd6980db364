"""Groups of completions sampled from the policy: each prompt is read once, its group shares the latent cache.

The chance of every token comes from numbers drawn beforehand for its prompt, and is turned into a token by the inverse
of the cumulative distribution. So a completion is a function of the weights, the prompt and those numbers: not of the
batch it was sampled in, nor of the number of ranks, and a resumed run samples the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError, check_least
from model import MiniDeepSeek
from model.decoding.batching import Batcher, Completion, Request
from model.decoding.sampling import Sampling
from model.experts import Experts
from text.order import scramble
from text.tokenizer import Tokenizer
from training.run.interrupt import Watch

SLOTS = 128  # completions at a time where no setting says: as many rows as decode.c takes


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
        rollout_rows: most completions sampled at a time on one rank; one that ends makes room for the next.
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
        check_least(1, prompts=self.prompts, max_new_tokens=self.max_new_tokens, mu=self.mu)
        check_least(1, rollout_rows=self.rollout_rows)
        check_least(0, resample=self.resample)
        if self.group < 2:
            raise UserError(f"--group {self.group}: a completion is compared with its group; give at least 2")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be above 0; greedy answers of a group are equal")
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


def sample_groups(
    model: MiniDeepSeek,
    prompts: Sequence[Sequence[int]],
    chances: Sequence[Tensor],
    stop: int,
    temperature: float = 1.0,
    slots: int = SLOTS,
    watch: Watch | None = None,
    what: str = "sampling",
) -> Iterator[Completions]:
    """Sample a group of completions of each prompt, and yield the groups in their order as soon as they are whole.

    Args:
        prompts: token ids, none empty. chances: of each prompt (group, new) float32 in [0, 1); `new` is the limit of
            tokens.
        stop: the token that ends a completion and belongs to it.
        temperature: the log-probabilities are those of the tempered distribution; 0 takes the likeliest token.
        slots: most completions at a time; one that ends makes room for the next.
        watch: is shown how far this is, as `what`; once a signal came, no more groups come.
    """
    watch = watch or Watch()
    sampling = Sampling(temperature=temperature)
    requests = [
        [Request(ids, drawn.shape[1], sampling, (stop,), row) for row in drawn]
        for ids, drawn in zip(prompts, chances, strict=True)
    ]
    longest = max(len(request.prompt) + request.max_new_tokens for group in requests for request in group)
    total, done = sum(map(len, requests)), 0
    batcher = Batcher(model, min(slots, total), longest)
    for group in [[batcher.submit(request) for request in group] for group in requests]:
        while not all(completion.finish for completion in group):
            if watch.asked:
                return
            watch.show(f"{what}: {done} of {total} completions")
            done += sum(bool(event.finish) for event in batcher.step())
        yield _table(group, group[0].request.max_new_tokens)
    watch.show("")


def joined(groups: Iterable[Completions]) -> Completions:
    """All groups as one, as wide as the widest."""
    groups = list(groups)
    new = max(made.tokens.shape[1] for made in groups)
    return Completions(
        torch.cat([F.pad(made.tokens, (0, new - made.tokens.shape[1])) for made in groups]),
        torch.cat([made.lengths for made in groups]),
        torch.cat([F.pad(made.log_probs, (0, new - made.log_probs.shape[1])) for made in groups]),
        torch.cat([made.ended for made in groups]),
    )


def _table(completions: list[Completion], new: int) -> Completions:
    """Completions as tensors of the width `new`, on the host."""
    return Completions(
        torch.tensor([made.tokens + [0] * (new - len(made.tokens)) for made in completions]),
        torch.tensor([len(made.tokens) for made in completions]),
        torch.tensor([made.log_probs + [0.0] * (new - len(made.tokens)) for made in completions]),
        torch.tensor([made.finish == "stop" for made in completions]),
    )


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
    are decoded in C (`decoding/native.py`), by numbers between the products and logits that are not rounded at all.
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
