"""Learn from a teacher: its distributions over the next token (white box), or its answers to prompts (black box).

python distill.py --ckpt out/small/final --teacher out/sft/final --data chats.jsonl --out out/distilled
python distill.py --method answers --teacher http://localhost:8000/v1 --teacher_model NAME --data prompts.jsonl \\
    --out out/answers [--ckpt out/small/final]       without --ckpt only the file of answers, out/answers/sft.jsonl
python distill.py --method answers --teacher out/grpo/final --data arithmetic:1-3 --prompts 1000 --samples 8 \\
    --mix chats.jsonl --out kept.jsonl               rejection sampling (DeepSeek-R1 section 2.3.3), into a file
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cli import parse
from dataset import ChatDataset
from errors import UserError, check_least, command_line
from model import MiniDeepSeek
from text.sources.registry import find_sources
from text.tokenizer import Tokenizer
from training.alignment.sampler import Sampler
from training.chats import ChatSettings, chat_samples, open_chats
from training.distill.curation import FILE, AnswerSettings, gather_answers
from training.distill.distillation import DistillationLoss, DistillationSettings
from training.distill.endpoint import is_endpoint, open_endpoint
from training.distill.local_answers import open_local
from training.distill.on_policy import OnPolicyChats, OnPolicySettings
from training.distill.teacher import identity, is_ours, open_teacher
from training.distill.top_k import FOLDER, CachedTopKChats, TopK, cache_top_k, fingerprint
from training.losses import NextTokenLoss
from training.machine import choose_dtype
from training.parallel.ranks import Ranks
from training.run.estimate import fit_batch
from training.run.resume import check_unused
from training.settings import NextTokenSettings
from training.startup import begin, new_model, open_checkpoint
from training.step import Dataset
from training.trainer import Trainer


@dataclass(kw_only=True)
class DistillSettings(ChatSettings, NextTokenSettings, DistillationSettings, OnPolicySettings, AnswerSettings):
    """Settings of distillation.

    Args:
        out: run folder: checkpoints, metrics.jsonl, resolved config; for answers alone also a file, FILE.jsonl.
        method: logits, to learn from the teacher's distributions, or answers, to learn from its answers.
        teacher: checkpoint folder, a causal language model that transformers opens, or for answers an
            OpenAI-compatible endpoint, such as http://host:port/v1.
        data: conversations to learn from, separated by commas; for answers: prompts, which may also be problems.
        ckpt: checkpoint folder of the student; for answers it may be left out, to make the file of them alone.
        student: preset and changes to single fields of LMConfig, for fresh weights with the teacher's tokenizer
            instead of ckpt, such as {preset: demo, num_hidden_layers: 2}.
        precompute_top_k: ask the teacher once, before training, and keep so many tokens of each of its distributions;
            0: ask it at every step.
        bias_speed: speed of the router's balancing bias; a number or {share of the run: value}; left out: 0.001, and
            for a new student {0: 0.01, 0.9: 0.001}, since its few steps begin without any balance.
    """

    method: str = "logits"
    teacher: str
    ckpt: str = ""
    student: dict[str, Any] = field(default_factory=dict)
    precompute_top_k: int = 0
    bias_speed: float | dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.bias_speed is None:
            self.bias_speed = {"0": 0.01, "0.9": 0.001} if self.student else NextTokenSettings.bias_speed
        super().__post_init__()
        self.check()
        self.check_sampling()
        self.check_answers()
        check_least(0, precompute_top_k=self.precompute_top_k)
        if self.method not in ("logits", "answers"):
            raise UserError(f"--method {self.method}: one of logits, answers")
        if self.ckpt and self.student:
            raise UserError("--student: makes a new model; leave out --ckpt or --student")
        if self.student and not is_ours(self.teacher):
            raise UserError(
                f"--student: the teacher {self.teacher} is not a checkpoint of this project; give --ckpt instead"
            )
        if self.on_policy and self.rows_by_share:
            raise UserError(
                f"--batch_tokens {self.batch_tokens}: --on_policy samples for steps of one size; give one number"
            )
        if self.precompute_top_k and self.on_policy:
            raise UserError("--precompute_top_k: the student's answers are not known before; leave out --on_policy")
        if self.method == "logits" and is_endpoint(self.teacher):
            raise UserError(f"--teacher {self.teacher}: an endpoint tells no distributions; pass --method answers")
        if self.method == "logits" and not self.has_student:
            raise UserError("distill.py: give the student, --ckpt DIR or --student '{preset: demo}'")
        if self.out.endswith(FILE) and (self.method == "logits" or self.has_student):
            raise UserError(f"--out {self.out}: a file holds answers alone; name a folder to train a student")

    @property
    def has_student(self) -> bool:
        return bool(self.ckpt or self.student)


def main() -> None:
    settings = parse(DistillSettings, __doc__ or "")
    ranks = begin(settings)
    # Refuses a folder in use before minutes are spent.
    ranks.on_main(lambda: check_unused(Path(settings.out), settings.resume))
    if settings.method == "answers":
        settings.data = str(ask_for_answers(settings, ranks))
        if not settings.has_student:
            return
    model, tokenizer = (
        new_model(settings.student, settings.teacher) if settings.student else open_checkpoint(settings.ckpt)
    )
    dataset, validation = open_chats(settings, tokenizer, ranks)
    samples = chat_samples(settings, tokenizer, ranks, dataset)
    loss = NextTokenLoss(mtp=bool(model.mtp), mtp_steps=settings.mtp_steps)
    if settings.method == "logits":
        dataset, loss = with_teacher(settings, ranks, model, tokenizer, dataset)
    Trainer(settings, ranks, model, tokenizer, dataset, loss, validation, samples=samples).run()
    ranks.stop()


def ask_for_answers(settings: DistillSettings, ranks: Ranks) -> Path:
    """Return the file of the teacher's answers that are fit to learn from."""
    if ranks.world > 1:
        raise UserError("--method answers: one process asks; make the file without torchrun, then use full_sft.py")
    name, seed, sampling = settings.teacher, settings.seed, (settings.sample_temperature, settings.max_new_tokens)
    if is_endpoint(name):
        # It is asked without a seed, so another one would bring no other answers.
        teacher, own = open_endpoint(name, settings, *sampling), (name, settings.teacher_model)
    else:
        teacher = open_local(name, *sampling, seed, choose_dtype(settings.dtype, ranks.device), ranks.device)
        own = identity(name), seed  # not its path: the same weights anywhere give the same answers
    sources = find_sources(settings.data, settings.datasets, kind=None)
    mix = find_sources(settings.mix, settings.datasets, "chat") if settings.mix else []
    return gather_answers(
        Path(settings.out), sources, settings.resume, settings.on_error, settings, teacher, seed,
        (*own, *sampling), settings.max_new_tokens, mix,
    )  # fmt: skip


def with_teacher(
    settings: DistillSettings, ranks: Ranks, model: MiniDeepSeek, tokenizer: Tokenizer, chats: ChatDataset
) -> tuple[Dataset, DistillationLoss]:
    """Return what the student is trained on, the conversations or its own answers, and the loss to the teacher."""
    dataset: Dataset = chats
    dtype, vocab_size = choose_dtype(settings.dtype, ranks.device), model.config.vocab_size
    ask = partial(open_teacher, settings.teacher, tokenizer, vocab_size, dtype, ranks.device)
    if settings.precompute_top_k:
        k, temperature = settings.precompute_top_k, settings.temperature
        mark = fingerprint(chats.chats, identity(settings.teacher), vocab_size, k, temperature, str(dtype))
        folder = Path(settings.out) / FOLDER
        cache = cache_top_k(folder, chats, k, temperature, mark, ask, settings.micro_rows, dtype, ranks)
        dataset, teacher = CachedTopKChats(chats, cache), TopK.of_batch
    else:
        teacher = ask()
    if settings.on_policy:
        fit_batch(settings, ranks, len(chats))  # its answers are made for whole steps
        sampler = Sampler(model.to(ranks.device), dtype)
        dataset = OnPolicyChats(chats, sampler, settings, settings.rows, tokenizer.eos_id, ranks)
    loss = DistillationLoss(mtp=bool(model.mtp), mtp_steps=settings.mtp_steps, settings=settings, teacher=teacher)
    return dataset, loss


if __name__ == "__main__":
    command_line(main)
