"""Memory and speed of fine-tuning against transformers + peft + trl: same checkpoint, rows and adapter, interleaved.

python bench/memory.py [--preset 64m] [--rows 8] [--length 512] [--targets attention] [--rounds 3]

Ours and trl each train all weights, an adapter, and an adapter with activations recomputed, also on a base in 4
bits (QLoRA; ours in 8 too). Memory is the peak of the process beyond what it held after its imports.
trl and bitsandbytes are not requirements of the project: pip install trl bitsandbytes, or give the folder that has them
as PYTHONPATH; without bitsandbytes trl has no QLoRA.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import harness
import psutil
import torch
from harness import MEMORY, SPEED, Contender, Verdict

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

# What is measured interleaved; one group after the other, since all at once would need tens of GB.
GROUPS = (
    ("ours full", "trl full"),
    ("ours lora", "trl lora"),
    ("ours lora-recompute", "trl lora-recompute"),
    ("ours qlora-int8", "ours qlora-nf4", "ours qlora-nf4-recompute", "trl qlora-nf4"),
)
COLUMNS = {SPEED: "{:,.0f}", MEMORY: "{:,.0f}"}


def main() -> None:
    parser = harness.parser_of(__doc__, rows=8, length=512)
    parser.set_defaults(rounds=3)
    parser.add_argument("--targets", default="attention", help="what the adapter adapts: attention or all")
    parser.add_argument("--experts", default="eager", help="experts_implementation of transformers")
    options = parser.parse_args()
    if options.worker:
        who, way = options.worker.split(" ")
        (ours if who == "ours" else baseline)(way, options)
        return
    found: dict[str, Contender] = {}
    without = set() if importlib.util.find_spec("bitsandbytes") else {"trl qlora-nf4"}
    with harness.checkpoint(LMConfig.preset(options.preset, num_nextn_predict_layers=0)) as folder:
        train_bpe(["trl asks for a tokenizer"], 280, min_frequency=1).save(Path(folder))
        for group in GROUPS:
            names = {name: name for name in group if name not in without}
            found |= {one.name: one for one in harness.measured(names, options.rounds, folder)}
    pairs = [(way, way) for way in ("full", "lora", "lora-recompute", "qlora-nf4")] + [("lora-recompute", "lora")]
    verdicts = [
        Verdict.between(found[f"ours {way}"], found[f"trl {other}"], key, f"{way} {key}")
        for way, other in pairs
        for key in COLUMNS
        if f"trl {other}" in found
    ]
    title = (
        f"fine-tuning, {options.preset} without MTP, {options.rows} x {options.length} tokens, {options.dtype}, "
        f"adapters of r 8 on {options.targets}; medians of {options.rounds}"
    )
    harness.report(title, list(found.values()), COLUMNS, verdicts, {}, options.json)


def beyond_imports(options: argparse.Namespace) -> Callable[[float], dict[str, float]]:
    """From the seconds of a step: its speed, and the peak of the process beyond what it holds now."""
    tokens, device = options.rows * options.length, harness.device_of(options.device)
    held = psutil.Process().memory_info().rss / 2**20 if device.type == "cpu" else 0.0
    return lambda seconds: {SPEED: tokens / seconds, MEMORY: harness.memory_mb(device) - held}


def token_rows(options: argparse.Namespace, rows: int) -> torch.Tensor:
    """Return (rows, length) random ids, all of which count."""
    return torch.randint(0, 6400, (rows, options.length), generator=torch.Generator().manual_seed(0))


def ours(way: str, options: argparse.Namespace) -> None:
    """A step for each line on stdin."""
    dtype, device, measured = DTYPES[options.dtype], harness.device_of(options.device), beyond_imports(options)
    model = MiniDeepSeek.from_pretrained(options.folder)
    model.gradient_checkpointing = way.endswith("recompute")
    if way != "full":
        dropout = 0.1 if options.targets == "attention" else 0.0
        Adapter.add(model, LoraSettings(targets=options.targets, dropout=dropout), options.folder)
        shrink_frozen(model, next((base for base in ("int8", "nf4") if base in way), "auto"), dtype)
    model.to(device).train()
    loss = NextTokenLoss(mtp=False, balance_weight=0.0)
    optimizer = build_optimizer(model, OptimSettings(lr=1e-4, weight_decay=0.0))
    ids = token_rows(options, options.rows).to(device)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}

    def step() -> dict[str, float]:
        start = harness.now(device)
        with autocast(dtype, device):
            total, count, _ = loss(model, batch)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return measured(harness.now(device) - start)

    harness.serve(step, device, warm_up=3)


def baseline(way: str, options: argparse.Namespace) -> None:
    """A step of trl's own loop for each line on stdin."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise UserError(f"trl cannot be imported ({error}); pip install trl") from None
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.models.deepseek_v3 import modeling_deepseek_v3  # noqa: F401 (an import counts for neither)

    device, measured = harness.device_of(options.device), beyond_imports(options)
    lora, everywhere = None, options.targets == "all"
    if way != "full":
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
        use_cpu=device.type == "cpu", bf16=options.dtype == "bf16", disable_tqdm=True,
        gradient_checkpointing=way.endswith("recompute"),
    )  # fmt: skip
    # What its users do: train all weights in float32 under autocast, adapters on a base in bfloat16.
    dtype = torch.float32 if way == "full" else DTYPES[options.dtype]
    rows = token_rows(options, 64 * options.rows).tolist()
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype, experts_implementation=options.experts),
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(options.folder),
        peft_config=lora,
        callbacks=[harness.serving_callback(measured, device, warm_up=3)],
    ).train()


if __name__ == "__main__":
    command_line(main)
