"""Accuracy on held-out problems: greedy answers, judged as the reward `correct` judges them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from dataset import PromptDataset
from model import MiniDeepSeek
from model.generate import generate
from text.problems import Problem
from training.ranks import Ranks
from training.rewards import is_correct
from training.rollout import Sampler


class Accuracy:
    """A `Validation`: the share of held-out problems that the policy solves, in all and by kind.

    Args:
        prompts: whose `validation` is measured. max_new_tokens: most tokens of an answer; rows: answered at a time.
    """

    def __init__(self, prompts: PromptDataset, sampler: Sampler, max_new_tokens: int, rows: int) -> None:
        self.prompts, self.sampler, self.max_new_tokens, self.rows = prompts, sampler, max_new_tokens, rows
        self.kinds = sorted({problem.kind for problem in prompts.validation})

    def __call__(self, model: MiniDeepSeek, dtype: torch.dtype, ranks: Ranks) -> dict[str, Any]:
        policy, right, asked = self.sampler.refresh(), Counter(), Counter()
        mine = self.prompts.validation[ranks.rank :: ranks.world]
        for start in range(0, len(mine), self.rows):
            part = mine[start : start + self.rows]
            for problem, text in zip(part, self._answers(policy, part), strict=True):
                right[problem.kind] += is_correct(problem, text)
                asked[problem.kind] += 1
        sums = torch.tensor([[right[kind], asked[kind]] for kind in self.kinds], dtype=torch.float64)
        sums: Tensor = ranks.sum(sums.to(ranks.device)).cpu()
        entry = {"val_accuracy": (sums[:, 0].sum() / sums[:, 1].sum()).item()}
        if len(self.kinds) > 1:
            names = [f"val_accuracy_{kind.replace(' ', '_')}" for kind in self.kinds]
            entry |= dict(zip(names, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
        return entry

    def _answers(self, policy: MiniDeepSeek, problems: list[Problem]) -> list[str]:
        tokenizer, encoded = self.prompts.tokenizer, self.prompts.encode(problems)
        longest, device = max(map(len, encoded)), policy.lm_head.weight.device
        ids = torch.tensor([[tokenizer.pad_id] * (longest - len(row)) + row for row in encoded], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded], device=device)
        end = tokenizer.eos_id
        out = generate(policy, ids, self.max_new_tokens, eos_token_id=end, attention_mask=mask)
        answers = [row[: row.index(end)] if end in row else row for row in out[:, longest:].tolist()]
        return [tokenizer.decode(answer, skip_special_tokens=False) for answer in answers]
