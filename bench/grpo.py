"""One GRPO step, rollout and update, against trl's GRPOTrainer: same checkpoint, prompts and group size, in turn.

python bench/grpo.py [--preset demo] [--dtype fp32] [--prompts 8] [--group 8] [--new 64] [--rounds 5]
python bench/grpo.py --dtype bf16 --data gsm8k_train.jsonl --longest 256        prompts of a real length

trl is no requirement of the project: pip install trl accelerate, or give the folder that holds them as PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from device import add_device, device_of, memory_mb
from side_by_side import Contender, compare, findings, serve, verdict

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

COLUMNS = {"samples/s": "{:,.2f}", "memory_mb": "{:,.0f}"}

SHAPE = ("dtype", "prompts", "group", "new", "data", "longest", "device")


@reward
def variety(sample: Sample) -> float:
    """A number that differs from text to text, so that no group is without variance."""
    return distinct(sample.text)


def distinct(text: str) -> float:
    return float(len(set(text)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument(
        "--new", type=int, default=64, help="tokens of a completion; random weights hardly ever end one"
    )
    parser.add_argument("--data", default="arithmetic:1-3", help="problems, as for grpo_train.py")
    parser.add_argument("--longest", type=int, default=64, help="tokens of a prompt; longer ones are left out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the measurements to this file")
    parser.add_argument("--worker", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    add_device(parser)
    options = parser.parse_args()
    if options.worker:
        (ours if options.worker == "ours" else trl)(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(options.preset, Path(folder))
        shape = [f"--{name}={getattr(options, name)}" for name in SHAPE]
        contenders = [
            Contender(name, [__file__, "--folder", folder, *shape, "--worker", name]) for name in ("ours", "trl")
        ]
        compare(contenders, options.rounds)
    found = findings(
        f"GRPO step, {options.preset} without MTP, {options.prompts} prompts of {options.data} x {options.group} "
        f"completions of up to {options.new} tokens, {options.dtype}; medians of {options.rounds}",
        contenders,
    )
    found.verdicts = [verdict(*contenders, key) for key in COLUMNS]
    found.show(COLUMNS)
    found.save(options.json)


def write_checkpoint(preset: str, folder: Path) -> None:
    """Random weights, and a tokenizer of the made-up world."""
    texts = list(documents(World.build(1), "pretrain", 200_000))
    tokenizer = train_bpe(texts, 2000)
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
    trainer.module = model
    trainer._set_rates(0.5)

    def measure() -> dict[str, float]:
        start = time.perf_counter()
        trainer._step()
        trainer.progress.step += 1
        return {"samples/s": rows / (time.perf_counter() - start)}

    serve(measure, ranks.device)


def trl(options: argparse.Namespace) -> None:
    """A step of trl's trainer for each line on stdin: its own loop, which waits at the beginning of each step."""
    try:
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise UserError(f"trl cannot be imported ({error}); pip install trl accelerate") from None
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    rows = options.prompts * options.group
    prompts = PromptDataset([(options.data, 1.0)], Tokenizer.from_folder(options.folder), options.longest)
    chats = [{"prompt": [{"role": "user", "content": prompts.problem(i).question}]} for i in range(4000)]

    class Turns(TrainerCallback):
        """Answers each line on stdin with the speed of one step; two steps warm up."""

        done = 0

        def on_step_begin(self, args, state, control, **_) -> None:
            if self.done >= 2 and not sys.stdin.readline():
                sys.exit(0)
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **_) -> None:
            self.done += 1
            if self.done > 2:
                memory = memory_mb(device_of(options.device))
                speed = rows / (time.perf_counter() - self.start)
                print(json.dumps({"samples/s": speed, "memory_mb": memory}), flush=True)
            elif self.done == 2:
                print("{}", flush=True)

    def reward_funcs(completions: Sequence[list[dict[str, str]]], **_: object) -> list[float]:
        return [distinct(completion[0]["content"]) for completion in completions]

    on_cpu = device_of(options.device).type == "cpu"
    config = GRPOConfig(
        output_dir=options.folder + "/trl", per_device_train_batch_size=rows, num_generations=options.group,
        max_completion_length=options.new, learning_rate=1e-6, max_steps=1000, report_to=[], save_strategy="no",
        logging_strategy="no", use_cpu=on_cpu, bf16=options.dtype == "bf16", disable_tqdm=True, loss_type="grpo",
        beta=0.0, gradient_checkpointing=False, temperature=1.0,
    )  # fmt: skip
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32),
        reward_funcs=reward_funcs,
        args=config,
        train_dataset=Dataset.from_list(chats),
        processing_class=AutoTokenizer.from_pretrained(options.folder, padding_side="left"),
        callbacks=[Turns()],
    ).train()


if __name__ == "__main__":
    command_line(main)
