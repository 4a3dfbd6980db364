"""Accuracy on held-out problems: of greedy and of sampled answers, judged as the reward `correct` judges them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataset import PromptDataset
from model import MiniDeepSeek
from text.chats.problems import Problem
from training.alignment.rewards import is_correct
from training.alignment.sampler import Sampler, completion_texts, sample_groups, uniforms
from training.parallel.ranks import Ranks
from training.run.interrupt import Watch

SAMPLES = 4
KEY = 0x76616C  # keeps the random numbers of measuring apart from those of training


@dataclass(frozen=True)
class Accuracy:
    """A `Validation`: the share of held-out problems that the policy solves, in all and by kind.

    `val_accuracy` is that of greedy answers. `val_pass_1` is the mean over four answers sampled as in training
    (DeepSeek-R1 section 3), which is what the rewards of training are a sample of. Their random numbers never change.

    Attributes:
        prompts: whose `validation` is measured; name: of it, for the log. rows: sampled at a time.
    """

    prompts: PromptDataset
    sampler: Sampler
    max_new_tokens: int
    temperature: float
    rows: int
    name: str = ""

    def __call__(self, model: MiniDeepSeek, dtype: torch.dtype, ranks: Ranks) -> dict[str, Any]:
        policy, validation = self.sampler.refresh(), self.prompts.validation
        mine = list(enumerate(validation))[ranks.rank :: ranks.world]
        kinds = sorted({problem.kind for problem in validation})
        entry: dict[str, Any] = {"held_out": {"problems": self.name}} if self.name else {}
        for name, samples, temperature in (("accuracy", 1, 0.0), ("pass_1", SAMPLES, self.temperature)):
            right, asked = Counter(), Counter()
            for row, text in enumerate(self._answers(policy, mine, samples, temperature, ranks.watch)):
                problem = mine[row // samples][1]
                right[problem.kind] += is_correct(problem, text)
                asked[problem.kind] += 1
            sums = torch.tensor([[right[kind], asked[kind]] for kind in kinds], dtype=torch.float64)
            sums: Tensor = ranks.sum(sums.to(ranks.device)).cpu()
            entry[f"val_{name}"] = (sums[:, 0].sum() / sums[:, 1].sum()).item()
            if len(kinds) > 1:
                names = [f"val_{name}_{kind.replace(' ', '_')}" for kind in kinds]
                entry |= dict(zip(names, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
        return entry

    def _answers(
        self, policy: MiniDeepSeek, numbered: list[tuple[int, Problem]], samples: int, temperature: float, watch: Watch
    ) -> list[str]:
        """Return `samples` answers to each problem, those of a problem together; only some after a signal."""
        if not numbered:
            return []
        ids = self.prompts.encode([problem for _, problem in numbered])
        drawn = uniforms([(KEY, number) for number, _ in numbered], samples, self.max_new_tokens)
        stop = self.prompts.tokenizer.eos_id
        what = f"validating, {'sampled' if temperature else 'greedy'} answers"
        made = sample_groups(policy, ids, drawn, stop, temperature, self.rows, watch, what)
        return [text for group in made for text in completion_texts(self.prompts.tokenizer, group)]
