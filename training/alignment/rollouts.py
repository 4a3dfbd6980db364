"""Rollouts: groups of completions of the policy, sampled, judged by the rewards, and resampled without variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataset import PromptDataset
from errors import UserError, check_least, require
from model import MiniDeepSeek
from text.order import ANSWER_TOKENS
from training.alignment.advantages import advantages
from training.alignment.rewards import Rewards, Sample
from training.alignment.sampler import Completions, Sampler, sample_groups, to_samples, uniforms
from training.parallel.ranks import Ranks
from training.run.interrupt import Stopped

KEY = 0x6772706F  # keeps the random numbers of sampling apart from those of the data order


@dataclass(kw_only=True)
class RolloutSettings:
    """How completions are made and what becomes of them.

    Args:
        prompts: problems a step, over all ranks.
        group: completions of each, at least 2.
        max_new_tokens: most tokens of a completion.
        temperature: of the sampling.
        loss: grpo, dapo or dr_grpo.
        mu: optimiser steps on each batch of completions.
        resample: how often the prompts of groups without variance are replaced by others in a step (DAPO's dynamic
            sampling); what still has none is left out.
        overlong: keep or filter completions that were cut at the limit.
        rollout_rows: most completions sampled at a time on one rank; one that ends makes room for the next.
        replay_routing: train with the experts that sampling chose for each token, prompts included: where the routers
            choose others, a probability changes though no weight did (Ma et al. 2025, arXiv 2510.11370). Their weights
            come from the scores of training. Samples in PyTorch, not in C or CUDA graphs, which is slower.
    """

    prompts: int = 32
    group: int = 8
    max_new_tokens: int = ANSWER_TOKENS
    temperature: float = 1.0
    loss: str = "grpo"
    mu: int = 1
    resample: int = 0
    overlong: str = "keep"
    rollout_rows: int = 512
    replay_routing: bool = False

    def check(self) -> None:
        """Raises `UserError` for a value that makes no sense."""
        check_least(1, prompts=self.prompts, max_new_tokens=self.max_new_tokens, mu=self.mu)
        check_least(1, rollout_rows=self.rollout_rows)
        check_least(0, resample=self.resample)
        require(self.group >= 2, f"--group {self.group}: a completion is compared with its group; give at least 2")
        warm = 0 < self.temperature < float("inf")
        require(warm, f"--temperature {self.temperature}: must be above 0; greedy answers of a group are equal")
        require(self.overlong in ("keep", "filter"), f"--overlong {self.overlong}: one of keep, filter")


@dataclass
class Group:
    """One prompt with its G completions, judged. `values`: of each reward by name, before its weight."""

    prompt_T: list[int]
    samples_G: list[Sample]
    completions: Completions
    rewards_G: Tensor
    values: dict[str, list[float]]
    advantages_G: Tensor
    zero_variance: bool


@dataclass(frozen=True)
class Rollouts:
    """Makes the rollouts of a step: each group is a function of the weights, the seed, its slot and its turn alone."""

    prompts: PromptDataset
    rewards: Rewards
    sampler: Sampler
    settings: RolloutSettings
    ranks: Ranks

    def __post_init__(self) -> None:
        if self.settings.prompts % self.ranks.world:
            raise UserError(f"--prompts {self.settings.prompts}: does not divide among {self.ranks.world} ranks")

    def collect(self, number: int) -> tuple[list[Group], dict[str, float]]:
        """Make this rank's groups of rollout `number`. Returns also sums over them for the log.

        The sums are over the groups before resampling, so that they measure the policy on the data.
        """
        share = self.settings.prompts // self.ranks.world
        first = number * self.settings.prompts + self.ranks.rank * share
        policy, slots = self.sampler.refresh(), range(first, first + share)
        groups = self._groups(policy, list(slots), 0)
        sums = self._sums(groups)
        for turn in range(1, self.settings.resample + 1):
            places = [place for place, group in enumerate(groups) if group.zero_variance]
            sums["redrawn"] += len(places)
            for place, group in zip(places, self._groups(policy, [slots[p] for p in places], turn), strict=True):
                groups[place] = group
        return groups, sums

    def _groups(self, policy: MiniDeepSeek, slots: list[int], turn: int) -> list[Group]:
        """Sample and judge a group for each slot. Raises `Stopped` on all ranks if a signal came to one meanwhile."""
        settings, tokenizer = self.settings, self.prompts.tokenizer
        problems, made = [self.prompts.problem(slot, turn) for slot in slots], []
        prompts = self.prompts.encode(problems)
        if slots:
            keys = [(self.prompts.seed, KEY, slot, turn) for slot in slots]
            drawn_PGT = uniforms(keys, settings.group, settings.max_new_tokens)
            limits = tokenizer.eos_id, settings.temperature, settings.rollout_rows
            records = settings.replay_routing
            made = list(sample_groups(policy, prompts, drawn_PGT, *limits, self.ranks.watch, records=records))
        if self.ranks.asked_to_stop():
            raise Stopped
        if not slots:
            return []
        samples = to_samples(tokenizer, problems, made)
        totals, values = self.rewards(samples)
        rewards_PG = torch.tensor(totals).view(-1, settings.group)
        advantages_PG, zero_variance_P = advantages(rewards_PG, settings.loss)
        parts = [slice(start, start + settings.group) for start in range(0, len(samples), settings.group)]
        return [
            Group(
                prompts[place], samples[part], made[place], rewards_PG[place],
                {name: row[part] for name, row in values.items()}, advantages_PG[place], bool(zero_variance_P[place]),
            )
            for place, part in enumerate(parts)
        ]  # fmt: skip

    def _sums(self, groups: list[Group]) -> dict[str, float]:
        return {
            "groups": len(groups),
            "rows": len(groups) * self.settings.group,
            "tokens": sum(group.completions.lengths.sum().item() for group in groups),
            "ended": sum(group.completions.ended.sum().item() for group in groups),
            "zero_variance": sum(group.zero_variance for group in groups),
            "redrawn": 0,
            "reward": sum(group.rewards_G.sum().item() for group in groups),
            **{f"reward_{name}": sum(sum(g.values[name]) for g in groups) for name in self.rewards.functions},
        }
