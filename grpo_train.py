"""Reinforcement learning from verifiable rewards: group-relative policy optimisation (DeepSeekMath, DeepSeek-R1).

python grpo_train.py --ckpt out/sft/final --data gsm8k_train.jsonl --out out/grpo
python grpo_train.py --ckpt out/sft/final --data arithmetic:1-3 --out out/grpo --rewards '{correct: 1, language: 0.2}'
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from cli import parse
from dataset import PromptDataset
from errors import UserError, command_line, waiting
from text.sources.registry import find_sources
from training.alignment.accuracy import Accuracy
from training.alignment.batches import COUNTED, Experience
from training.alignment.policy_loss import GRPOLoss
from training.alignment.reference import ReferenceSettings, frozen_reference
from training.alignment.rewards import Rewards
from training.alignment.rollouts import Rollouts, RolloutSettings
from training.alignment.sampler import Sampler
from training.machine import choose_dtype
from training.optim.build import OptimSettings
from training.parallel.dist_settings import CutSettings
from training.run.progress import saved_run
from training.startup import begin, open_checkpoint
from training.trainer import Trainer
from training.validation import problems_name


@dataclass(kw_only=True)
class GRPOSettings(ReferenceSettings, RolloutSettings):
    """Settings of reinforcement learning. A step has prompts * group rows: batch_tokens does not count here.

    Args:
        data: problems, separated by commas, each NAME or NAME=WEIGHT: a name in --datasets, a file or Hub id of
            questions and answers, arithmetic:1-3, or reasoning_gym:TASK.
        rewards: names and weights; see training/alignment/rewards.py; package.module:function for one of your own.
        system: system prompt before every question.
        clip_low: how far the probability of a token may fall in the steps on one batch, 0.2 for 0.8 times.
        clip_high: how far it may rise; DAPO takes 0.28.
        beta: weight of the KL term to the reference; 0 needs no reference.
        val_fraction: share of the problems of files held out.
        val_problems: most held-out problems to measure on.
    """

    data: str
    rewards: dict[str, float] = field(default_factory=lambda: {"correct": 1.0})
    system: str = ""
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    val_fraction: float = 0.02
    val_problems: int = 128
    dist: CutSettings = field(default_factory=CutSettings)
    log_every: int = 1
    val_every: int = 20
    save_every: int = 50
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=1e-5, weight_decay=0.0, decay_from=1.0))

    COMPILES: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()
        if self.max_new_tokens >= self.sequence_length:
            raise UserError(
                f"--max_new_tokens {self.max_new_tokens}: leaves no room for a prompt in a --sequence_length of "
                f"{self.sequence_length}"
            )
        if self.compile:
            raise UserError("--compile: the batches of this stage change their shape every step; leave it out")

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def uneven(self) -> bool:
        return True

    def lighten(self, device: str) -> str:
        now = [f"--{name}, now {getattr(self, name)}" for name in ("prompts", "group", "max_new_tokens")]
        return f"lower {now[0]}, {now[1]}, or {now[2]}, or take a smaller model"

    def check_by_hand(self) -> None:
        """Raise `UserError` for an option of the command line that would change nothing. Recipes may hold it."""
        if "batch_tokens" in (self.by_hand or ()):
            raise UserError(
                f"--batch_tokens {self.batch_tokens}: a step of this stage has --prompts x --group completions, "
                f"now {self.prompts} x {self.group}; give these instead"
            )


def main() -> None:
    settings = parse(GRPOSettings, __doc__ or "")
    settings.check_by_hand()
    ranks = begin(settings)
    rewards = Rewards.of(settings.rewards)
    cut = settings.dist.cuts(ranks.world)
    model, tokenizer = open_checkpoint(settings.ckpt, cut=cut)
    # The drafts of MTP earn no reward: its layers stay as they are, and so do the routers' biases (no bias_speed), so
    # that sampler, policy and reference route alike and a batch of one kind of problem does not set the balance.
    model.mtp.requires_grad_(False)
    if not cut:
        model = model.to(ranks.device)
    reference = frozen_reference(settings, ranks, model, tokenizer) if settings.beta else None
    longest = settings.sequence_length - settings.max_new_tokens
    options = {name: getattr(settings, name) for name in ("system", "on_error", "val_fraction", "val_problems")}
    sources = find_sources(settings.data, settings.datasets, "prompt")
    with waiting(f"reading {settings.data}", ranks.main):
        prompts = PromptDataset(sources, tokenizer, longest, settings.seed, **options)
    if ranks.main:
        prompts.print_summary()
    if settings.replay_routing:
        if not any(layer.is_moe for layer in model.model.layers):
            raise UserError(f"--replay_routing: {settings.ckpt} has no experts; leave it out")
        ranks.say("notice: --replay_routing samples in PyTorch: neither C nor CUDA graphs record the experts")
    dtype, limits = choose_dtype(settings.dtype, ranks.device), (settings.max_new_tokens, settings.temperature)
    sampler = Sampler(model, dtype, ranks.device if cut else None)
    rollouts = Rollouts(prompts, rewards, sampler, settings, ranks)
    begun = ranks.on_main(lambda: saved_run(Path(settings.out), settings.resume))
    counts_positions = bool(begun) and not str(begun.get("data")).endswith(COUNTED)  # an older run goes on as it began
    shape = settings.sequence_length, settings.micro_rows
    experience = Experience(rollouts, *shape, dtype, reference, counts_positions)
    loss = GRPOLoss(settings.loss, limits[0], settings.clip_low, settings.clip_high, settings.beta, limits[1])
    accuracy = None
    if prompts.validation:
        name = problems_name(sources, prompts.validation)
        accuracy = Accuracy(prompts, sampler, *limits, settings.rollout_rows, name)
    Trainer(settings, ranks, model, tokenizer, experience, loss, accuracy).run()
    ranks.stop()


if __name__ == "__main__":
    command_line(main)
