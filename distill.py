"""Learn from a teacher: its distributions over the next token (white box), or its answers to prompts (black box).

python distill.py --ckpt out/small/final --teacher out/sft/final --data chats.jsonl --out out/distilled
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from errors import UserError, command_line
from training.chats import ChatSettings, open_chats
from training.distillation import DistillationLoss, DistillationSettings
from training.machine import choose_dtype
from training.own_answers import OnPolicySettings, OwnAnswers
from training.resume import left_off
from training.rollout import Sampler
from training.settings import parse
from training.stage import begin, open_checkpoint
from training.teacher import identity, open_teacher
from training.top_k import FOLDER, KeptTeacher, TaughtChats, fingerprint, keep_top_k
from training.trainer import Trainer


@dataclass(kw_only=True)
class DistillSettings(ChatSettings, DistillationSettings, OnPolicySettings):
    """Settings of distillation.

    Args:
        teacher: checkpoint folder, or a causal language model that transformers opens.
        precompute_top_k: ask the teacher once, before training, and keep so many tokens of each of its distributions;
            0: ask it at every step.
    """

    teacher: str
    precompute_top_k: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()
        self.check_sampling()
        if self.precompute_top_k < 0:
            raise UserError(f"--precompute_top_k {self.precompute_top_k}: must be at least 0")
        if self.precompute_top_k and self.on_policy:
            raise UserError("--precompute_top_k: nobody knows yet what the student will answer; leave out --on_policy")


def main() -> None:
    settings = parse(DistillSettings, __doc__ or "")
    ranks = begin(settings)
    left_off(Path(settings.out), settings.resume, {})  # refuses a folder in use before minutes are spent
    model, tokenizer = open_checkpoint(settings.ckpt)
    dtype = choose_dtype(settings.dtype, ranks.device)
    vocab_size = model.config.vocab_size
    ask = partial(open_teacher, settings.teacher, tokenizer, vocab_size, dtype, ranks.device)
    dataset, validation = open_chats(settings, tokenizer, ranks)
    if settings.precompute_top_k:
        k, temperature = settings.precompute_top_k, settings.temperature
        mark = fingerprint(dataset.chats, identity(settings.teacher), vocab_size, k, temperature, str(dtype))
        folder = Path(settings.out) / FOLDER
        kept = keep_top_k(folder, dataset, k, temperature, mark, ask, settings.micro_rows, dtype, ranks)
        dataset, teacher = TaughtChats(dataset, kept), KeptTeacher()
    else:
        teacher = ask()
    if settings.on_policy:
        sampler = Sampler(model.to(ranks.device), dtype)
        dataset = OwnAnswers(dataset, sampler, settings, settings.rows, tokenizer.eos_id, ranks)
    loss = DistillationLoss(mtp=bool(model.mtp), settings=settings, teacher=teacher)
    Trainer(settings, ranks, model, tokenizer, dataset, loss, validation).run()
    ranks.stop()


if __name__ == "__main__":
    command_line(main)
