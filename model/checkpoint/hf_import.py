"""Any `deepseek_v3` folder becomes one of this project's: float32, in one file, with its tokenizer if it has one.

And a folder becomes one for vLLM's CPU build with `--enforce-eager`; compiled, vLLM opens any folder of this project.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from errors import UserError
from LMConfig import LMConfig
from model.checkpoint.card import renew_card
from model.checkpoint.folder import CARD
from model.transformer import MiniDeepSeek

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
# The special tokens that every tokenizer of this project begins with; chat and the stages' masks stand on these ids.
OWN_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")


def import_folder(source: Path, target: Path) -> None:
    """Write the checkpoint folder `source` as `target`, complete or not at all, and print what came of it.

    Raises:
        UserError: `target` is there already, or `source` is no deepseek_v3 folder.
        DamagedCheckpoint: weights or FP8 scales of `source` are damaged; nothing is written.
    """
    model = rewrite_folder(source, target)
    if foreign := _foreign_tokenizer(source, model.config.vocab_size):
        print(f"notice: {source}: {foreign}", file=sys.stderr)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{target}: {parameters:,} parameters in float32, {len(model.mtp)} MTP layers")


def export_vllm_cpu(source: Path, target: Path) -> None:
    """Write the checkpoint folder `source` as `target`, with YaRN in its config. Raises as `import_folder` does.

    vLLM's CPU kernel for plain RoPE rotates the queries and keys of MLA wrongly. Under YaRN vLLM rotates in PyTorch,
    rightly, and YaRN by a factor of 1 is plain RoPE.
    """
    config = LMConfig.from_pretrained(source)
    if config.attention != "mla":
        raise UserError(f"{source}: its attention is {config.attention}, not DeepSeek-V3's: vLLM cannot run it")
    plain = {
        "type": "yarn", "factor": 1.0, "original_max_position_embeddings": config.max_position_embeddings,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    scaling = config.rope_scaling or plain
    rewrite_folder(source, target, rope_scaling=scaling)
    print(f"{target}: for vLLM's CPU build, with YaRN by a factor of {scaling['factor']:g}")


def rewrite_folder(source: Path, target: Path, **changes: Any) -> MiniDeepSeek:
    """Write `source` as `target`, with changes to its config, complete or not at all. Returns its model."""
    if target.exists():
        raise UserError(f"{target}: is there already; choose a new folder")
    model = MiniDeepSeek.from_pretrained(source)
    model.config = replace(model.config, **changes)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        for name in (*TOKENIZER_FILES, CARD):  # the card has the licence of the weights
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not (target / CARD).is_file():
        renew_card(target)
    return model


def _foreign_tokenizer(folder: Path, vocab_size: int) -> str:
    """What about the folder's tokenizer keeps this project's stages and chat from using it; nothing where they can."""
    works = "the weights, generate() on token ids and transformers work, this project's stages and chat do not"
    path = folder / "tokenizer.json"
    if not path.is_file():
        return f"no tokenizer.json: {works}; copy the one that the weights were trained with"
    try:
        content = json.loads(path.read_text(encoding="utf8"))
        names = {token["id"]: token["content"] for token in content["added_tokens"]}
        size = 1 + max([*names, *content["model"]["vocab"].values()])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"tokenizer.json cannot be read: {works}"
    if size > vocab_size:
        return f"tokenizer.json has {size} tokens, the model's vocabulary {vocab_size}: {works}"
    if [names.get(number) for number in range(len(OWN_TOKENS))] != list(OWN_TOKENS):
        return f"tokenizer.json is not one of train_tokenizer.py ({OWN_TOKENS[5]} is not token 5, ...): {works}"
    return ""
