"""One GRPO step, rollout and update, against trl's GRPOTrainer: same checkpoint, prompts and group size, interleaved.

python bench/grpo.py [--preset demo] [--dtype fp32] [--prompts 8] [--group 8] [--new 64] [--rounds 5]
python bench/grpo.py --dtype bf16 --data gsm8k_train.jsonl --longest 256        prompts of a real length

trl is not a requirement of the project: pip install trl accelerate, or give the folder that holds them as PYTHONPATH.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import harness
import torch
from harness import MEMORY, Verdict

from dataset import PromptDataset
from errors import UserError, command_line
from grpo_train import GRPOSettings
from LMConfig import LMConfig
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from text.tokenizer_training import train_bpe
from training.alignment.batches import Experience
from training.alignment.policy_loss import GRPOLoss
from training.alignment.rewards import Rewards, Sample, reward
from training.alignment.rollouts import Rollouts
from training.alignment.sampler import Sampler
from training.machine import DTYPES
from training.optim.build import OptimSettings
from training.parallel.ranks import Ranks
from training.trainer import Trainer
from world.cast import World
from world.corpus import documents

SPEED = "samples/s"
COLUMNS = {SPEED: "{:,.2f}", MEMORY: "{:,.0f}"}


@reward
def variety(sample: Sample) -> float:
    """Return a number that differs from text to text, so that no group is without variance."""
    return float(len(set(sample.text)))


def main() -> None:
    parser = harness.parser_of(__doc__, preset="demo", dtype="fp32", prompts=8, group=8, new=64, longest=64)
    parser.add_argument("--data", default="arithmetic:1-3", help="problems, as for grpo_train.py")
    options = parser.parse_args()
    if options.worker:
        {"ours": ours, "trl": trl}[options.worker](options)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(options.preset, Path(folder))
        contenders = harness.measured({"ours": "ours", "trl": "trl"}, options.rounds, folder)
    title = (
        f"GRPO step, {options.preset} without MTP, {options.prompts} prompts of {options.data} x {options.group} "
        f"completions of up to {options.new} tokens, {options.dtype}; medians of {options.rounds}"
    )
    verdicts = [Verdict.between(*contenders, key) for key in COLUMNS]
    harness.report(title, contenders, COLUMNS, verdicts, {}, options.json)


def write_checkpoint(preset: str, folder: Path) -> None:
    """Random weights, and a tokenizer of the made-up world."""
    tokenizer = train_bpe(list(documents(World.build(1), "pretrain", 200_000)), 2000)
    tokenizer.save(folder)
    torch.manual_seed(0)
    ids = dict(vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    config = LMConfig.preset(preset, num_nextn_predict_layers=0, pad_token_id=tokenizer.pad_id, **ids)
    MiniDeepSeek(config).save_pretrained(folder)


def ours(options: argparse.Namespace) -> None:
    """A step of the project's trainer for each line on stdin."""
    rows, length = options.prompts * options.group, options.longest + options.new
    settings = GRPOSettings(
        ckpt=options.folder, data=options.data, out=options.folder + "/run", dtype=options.dtype, device=options.device,
        prompts=options.prompts, group=options.group, max_new_tokens=options.new, sequence_length=length,
        micro_tokens=rows * length, max_steps=10**6, optim=OptimSettings(lr=1e-6, weight_decay=0.0),
    )  # fmt: skip
    ranks, dtype = Ranks.start(options.device), DTYPES[options.dtype]
    model, tokenizer = MiniDeepSeek.from_pretrained(options.folder), Tokenizer.from_folder(options.folder)
    model.to(ranks.device)  # before the sampler copies it
    prompts = PromptDataset([(options.data, 1.0)], tokenizer, options.longest)
    rewards = Rewards({"variety": variety}, {"variety": 1.0})
    rollouts = Rollouts(prompts, rewards, Sampler(model, dtype), settings, ranks)
    experience = Experience(rollouts, length, rows, dtype)
    trainer = Trainer(settings, ranks, model, tokenizer, experience, GRPOLoss("grpo", options.new))

    def measure() -> dict[str, float]:
        start = time.perf_counter()
        trainer.advance()
        return {SPEED: rows / (time.perf_counter() - start)}

    harness.serve(measure, ranks.device)


def trl(options: argparse.Namespace) -> None:
    """A step of trl's own loop for each line on stdin."""
    try:
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise UserError(f"trl cannot be imported ({error}); pip install trl accelerate") from None
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows, device = options.prompts * options.group, harness.device_of(options.device)
    prompts = PromptDataset([(options.data, 1.0)], Tokenizer.from_folder(options.folder), options.longest)
    chats = [{"prompt": [{"role": "user", "content": prompts.problem(i).question}]} for i in range(4000)]

    def reward_funcs(completions: Sequence[list[dict[str, str]]], **_: object) -> list[float]:
        return [float(len(set(completion[0]["content"]))) for completion in completions]

    config = GRPOConfig(
        output_dir=options.folder + "/trl", per_device_train_batch_size=rows, num_generations=options.group,
        max_completion_length=options.new, learning_rate=1e-6, max_steps=1000, report_to=[], save_strategy="no",
        logging_strategy="no", use_cpu=device.type == "cpu", bf16=options.dtype == "bf16", disable_tqdm=True,
        loss_type="grpo", beta=0.0, gradient_checkpointing=False, temperature=1.0,
    )  # fmt: skip
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32),
        reward_funcs=reward_funcs,
        args=config,
        train_dataset=Dataset.from_list(chats),
        processing_class=AutoTokenizer.from_pretrained(options.folder, padding_side="left"),
        callbacks=[harness.serving_callback(lambda seconds: {SPEED: rows / seconds}, device, warm_up=2)],
    ).train()


if __name__ == "__main__":
    command_line(main)
