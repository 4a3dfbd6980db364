"""Memory and speed of fine-tuning against transformers + peft + trl: same checkpoint, rows and adapter, in turn.

python bench/memory.py [--preset 64m] [--rows 8] [--length 512] [--targets attention] [--rounds 3]

Ours and the peer each train all weights, an adapter, and an adapter with activations recomputed, also on a base in 4
bits (QLoRA; ours in 8 too). Memory is the peak of the process beyond what it held after its imports.
trl and bitsandbytes are no requirements of the project: pip install trl bitsandbytes, or give the folder that has them
as PYTHONPATH; without bitsandbytes the peer has no QLoRA.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from device import add_device, device_of, memory_mb, now
from side_by_side import Contender, compare, findings, verdict

from errors import UserError, command_line
from LMConfig import LMConfig
from model import MiniDeepSeek
from text.tokenizer_training import train_bpe
from training.adapters.adapter import Adapter
from training.adapters.frozen import shrink_frozen
from training.adapters.lora import LoraSettings
from training.losses import NextTokenLoss
from training.machine import DTYPES, autocast
from training.optim.build import OptimSettings, build_optimizer

# What is measured in turn: ours, and the peer's.
GROUPS = {
    "full": (("full",), ("full",)),
    "lora": (("lora",), ("lora",)),
    "lora-recompute": (("lora-recompute",), ("lora-recompute",)),
    "qlora": (("qlora-int8", "qlora-nf4", "qlora-nf4-recompute"), ("qlora-nf4",)),
}
COLUMNS = {"tokens/s": "{:,.0f}", "memory_mb": "{:,.0f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="64m")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--targets", default="attention", help="what the adapter adapts: attention or all")
    parser.add_argument("--experts", default="eager", help="experts_implementation of transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the measurements to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    add_device(parser)
    options = parser.parse_args()
    if options.worker:
        who, way = options.worker.split(" ")
        (ours if who == "ours" else peer)(way, options)
        return
    given = [
        f"--{name}={getattr(options, name)}" for name in ("dtype", "rows", "length", "targets", "experts", "device")
    ]
    contenders: dict[str, Contender] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        MiniDeepSeek(LMConfig.preset(options.preset, num_nextn_predict_layers=0)).save_pretrained(folder)
        train_bpe(["trl asks for a tokenizer"], 280, min_frequency=1).save(Path(folder))
        for way, (own, others) in GROUPS.items():  # one after the other: all at once would need tens of GB
            if way == "qlora" and not importlib.util.find_spec("bitsandbytes"):
                others = ()
            names = [*(f"ours {name}" for name in own), *(f"trl {name}" for name in others)]
            group = [Contender(name, [__file__, "--folder", folder, *given, "--worker", name]) for name in names]
            compare(group, options.rounds)
            contenders |= {contender.name: contender for contender in group}
    found = findings(
        f"fine-tuning, {options.preset} without MTP, {options.rows} x {options.length} tokens, {options.dtype}, "
        f"adapters of r 8 on {options.targets}; medians of {options.rounds}",
        list(contenders.values()),
    )
    pairs = [("full", "full"), ("lora", "lora"), ("lora-recompute", "lora-recompute"), ("qlora-nf4", "qlora-nf4")]
    for mine, theirs in [*pairs, ("lora-recompute", "lora")]:
        if f"trl {theirs}" in contenders:
            pair = contenders[f"ours {mine}"], contenders[f"trl {theirs}"]
            found.verdicts += [replace(verdict(*pair, key), quantity=f"{mine} {key}") for key in COLUMNS]
    found.show(COLUMNS)
    found.save(options.json)


def token_rows(options: argparse.Namespace, rows: int) -> torch.Tensor:
    """(rows, length) random ids, all of which count."""
    return torch.randint(0, 6400, (rows, options.length), generator=torch.Generator().manual_seed(0))


class Meter:
    """Speed of a step, and the peak of the process beyond what it held when this was made."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tokens, self.device = options.rows * options.length, device_of(options.device)
        self.held = psutil.Process().memory_info().rss / 2**20 if self.device.type == "cpu" else 0.0
        self.start = 0.0

    def begin(self) -> None:
        self.start = now(self.device)

    def end(self) -> dict[str, float]:
        seconds = now(self.device) - self.start
        return {"tokens/s": self.tokens / seconds, "memory_mb": memory_mb(self.device) - self.held}


def ours(way: str, options: argparse.Namespace) -> None:
    """A step for each line on stdin; three warm up."""
    dtype, device = DTYPES[options.dtype], device_of(options.device)
    meter = Meter(options)
    model = MiniDeepSeek.from_pretrained(options.folder)
    model.gradient_checkpointing = way.endswith("recompute")
    if way != "full":
        dropout = 0.1 if options.targets == "attention" else 0.0
        Adapter.add(model, LoraSettings(targets=options.targets, dropout=dropout), options.folder)
        base = next((base for base in ("int8", "nf4") if base in way), "auto")
        shrink_frozen(model, base, dtype)
    model.to(device).train()
    loss = NextTokenLoss(mtp=False, balance_weight=0.0)
    optimizer = build_optimizer(model, OptimSettings(lr=1e-4, weight_decay=0.0))
    ids = token_rows(options, options.rows).to(device)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}

    def step() -> dict[str, float]:
        meter.begin()
        with autocast(dtype, device):
            total, count, _ = loss(model, batch)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return meter.end()

    for _ in range(3):
        step()
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


def peer(way: str, options: argparse.Namespace) -> None:
    """A step of trl's own loop for each line on stdin: it waits at the beginning of each; three warm up."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise UserError(f"trl cannot be imported ({error}); pip install trl") from None
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from transformers.models.deepseek_v3 import modeling_deepseek_v3  # noqa: F401 (an import counts for nobody)

    meter = Meter(options)

    class Turns(TrainerCallback):
        done = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.done >= 3 and not sys.stdin.readline():
                sys.exit(0)
            meter.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.done += 1
            result = meter.end()
            if self.done >= 3:
                print("{}" if self.done == 3 else json.dumps(result), flush=True)

    lora = None
    if way != "full":
        everywhere = options.targets == "all"
        lora = LoraConfig(
            r=8,
            lora_alpha=32,
            lora_dropout=0.0 if everywhere else 0.1,
            target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if everywhere else None,
        )
    config = SFTConfig(
        output_dir=f"{options.folder}/{way}", per_device_train_batch_size=options.rows, max_length=options.length,
        learning_rate=1e-4, max_steps=10**6, report_to=[], save_strategy="no", logging_strategy="no",
        use_cpu=meter.device.type == "cpu",
        bf16=options.dtype == "bf16", disable_tqdm=True, gradient_checkpointing=way.endswith("recompute"),
    )  # fmt: skip
    # What its users do: train all weights in float32 under autocast, adapters on a base in bfloat16.
    dtype = torch.float32 if way == "full" else DTYPES[options.dtype]
    rows = token_rows(options, 64 * options.rows)
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype, experts_implementation=options.experts),
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(options.folder),
        peft_config=lora,
        callbacks=[Turns()],
    ).train()


if __name__ == "__main__":
    command_line(main)
