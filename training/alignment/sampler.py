"""Groups of completions sampled from the policy: each prompt is read once, its group shares the latent cache.

Each token has a uniform random number drawn beforehand for its prompt, which the inverse of the cumulative distribution
turns into the token. So a completion is a function of the weights, the prompt and those numbers: not of the batch it
was sampled in, nor of the number of ranks, and a resumed run samples the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model import MiniDeepSeek
from model.decoding.engine import Engine
from model.decoding.sampling import Sampling
from model.decoding.scheduler import Completion, Request
from model.experts import Experts
from text.chats.problems import Problem
from text.order import scramble
from text.tokenizer import Tokenizer
from training.alignment.rewards import Sample
from training.run.interrupt import Watch

if TYPE_CHECKING:
    from training.parallel.sharding import Shards

SLOTS = 128  # completions at a time where no setting says: as many rows as decode.c takes


@dataclass
class Completions:
    """What was sampled, one row a completion; the completions of a prompt stand together.

    Attributes:
        tokens: (rows, new) int64, 0 after the end. lengths: (rows,) tokens of each, the end token included.
        log_probs: (rows, new) float32, the sampler's, 0 after the end.
        ended: (rows,) bool, False when cut at the limit.
        experts: of each completion, where they were recorded (`model.decoding.recording.RecordingEngine.experts`).
    """

    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor
    ended: Tensor
    experts: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, completions: list[Completion], new: int) -> Completions:
        """Completions as tensors of the width `new`, on the host."""
        return cls(
            torch.tensor([made.tokens + [0] * (new - len(made.tokens)) for made in completions]),
            torch.tensor([len(made.tokens) for made in completions]),
            torch.tensor([made.log_probs + [0.0] * (new - len(made.tokens)) for made in completions]),
            torch.tensor([made.finish == "stop" for made in completions]),
        )


def sample_groups(
    model: MiniDeepSeek,
    prompts: Sequence[Sequence[int]],
    uniforms_PGT: Sequence[Tensor],
    stop: int,
    temperature: float = 1.0,
    slots: int = SLOTS,
    watch: Watch | None = None,
    what: str = "sampling completions",
    records: bool = False,
) -> Iterator[Completions]:
    """Sample a group of completions of each prompt, and yield the groups in their order as soon as they are whole.

    Args:
        prompts: token ids, none empty. uniforms_PGT: of each prompt (group, new) float32 in [0, 1); `new` is the limit
            of tokens.
        stop: the token that ends a completion and belongs to it.
        temperature: the log-probabilities are those of the tempered distribution; 0 takes the likeliest token.
        slots: most completions at a time; one that ends makes room for the next.
        watch: is shown how far this is, as `what`; once a signal came, no more groups come.
        records: with the experts of each token; sampled in PyTorch.
    """
    watch = watch or Watch()
    sampling = Sampling(temperature=temperature)
    requests = [
        [Request(ids, drawn.shape[1], sampling, (stop,), row) for row in drawn]
        for ids, drawn in zip(prompts, uniforms_PGT, strict=True)
    ]
    longest = max(len(request.prompt) + request.max_new_tokens for group in requests for request in group)
    total, done = sum(map(len, requests)), 0.0  # of one that runs the share of its tokens
    kind = resolve_name("model.decoding.recording:RecordingEngine") if records else Engine
    engine = kind(model, min(slots, total), longest)
    for group in [[engine.submit(request) for request in group] for group in requests]:
        while not all(completion.finish for completion in group):
            if watch.asked:
                return
            watch.show(what, done, total)
            done += sum(advance(event.completion) for event in engine.step())
        made = Completions.of(group, group[0].request.max_new_tokens)
        yield replace(made, experts=[engine.experts(one) for one in group]) if records else made
    watch.show("", 0, 0)


def advance(completion: Completion) -> float:
    """Return what its last token has added to the share of it that is made: all that was missing, if it is the end."""
    made, most = len(completion.tokens), completion.request.max_new_tokens
    return (most - made + 1 if completion.finish else 1) / most


def uniforms(keys: Sequence[tuple[int, ...]], group: int, new: int) -> Tensor:
    """Return (P, G, T) numbers in [0, 1), those of a prompt a function of its key alone."""
    generators = (torch.Generator().manual_seed(scramble(*key) >> 1) for key in keys)
    return torch.stack([torch.rand(group, new, generator=generator) for generator in generators])


def completion_texts(tokenizer: Tokenizer, made: Completions) -> list[str]:
    """Return the texts of completions without the tokens that ended them; marks such as <think> are kept."""
    lengths = (made.lengths - made.ended.long()).tolist()
    rows = zip(made.tokens.tolist(), lengths, strict=True)
    return [tokenizer.decode(tokens[:length], skip_special_tokens=False) for tokens, length in rows]


def to_samples(tokenizer: Tokenizer, problems: Sequence[Problem], groups: Sequence[Completions]) -> list[Sample]:
    """Return what the rewards judge, group after group. The groups are as wide as a completion may be long."""
    samples = []
    for problem, made in zip(problems, groups, strict=True):
        rows = zip(completion_texts(tokenizer, made), made.lengths.tolist(), made.ended.tolist(), strict=True)
        samples += [Sample(problem, text, length, made.tokens.shape[1], ended) for text, length, ended in rows]
    return samples


class Sampler:
    """The policy in the type that it computes in. In bfloat16 a copy of the matrices, refreshed for every rollout.

    Where ranks train shards of it, each has such a copy of the whole.

    Norms and routers keep their float32 weights, so that products are rounded where autocast rounds them in training.
    Sampler and trainer differ by the order of their sums, by the absorbed form of attention, and on CPU, where few rows
    are decoded in C (`decoding/native.py`), by numbers between the products and logits that are not rounded at all.
    """

    def __init__(self, model: MiniDeepSeek, dtype: torch.dtype, whole_on: torch.device | None = None) -> None:
        """whole_on: where the copy is, if the model will be in shards; before its first use `shards` is set."""
        self.source = self.model = model
        self.shards: Shards | None = None
        if dtype != torch.float32 or whole_on:
            self.model = copy.deepcopy(model).requires_grad_(False)
            for module in self.model.modules():
                if isinstance(module, (nn.Linear, nn.Embedding, Experts)):
                    module.to(dtype)
            if whole_on:
                resolve_name("training.parallel.initial:with_memory")(self.model, whole_on)
            self.model.eval()

    @torch.no_grad()
    def refresh(self) -> MiniDeepSeek:
        """Return the policy as it is now; called by all ranks together."""
        if self.shards:
            self.shards.copy_to(self.model)
        elif self.model is not self.source:
            for mine, theirs in zip(self.model.state_dict().values(), self.source.state_dict().values(), strict=True):
                mine.copy_(theirs)
        return self.model
