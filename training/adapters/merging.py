"""Adapters merged into the weights of their base: in memory to be used, or as a checkpoint folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from errors import UserError, naming
from model import MiniDeepSeek
from text.tokenizer import Tokenizer
from training.adapters.adapter import Adapter
from training.startup import open_checkpoint


def open_adapted(ckpt: str, folder: str) -> tuple[MiniDeepSeek, Tokenizer]:
    """The fp32 model of a checkpoint folder with the adapter of `folder` in its weights, and its tokenizer."""
    model, tokenizer = open_checkpoint(ckpt)
    theirs = Path(folder) / "tokenizer.json"
    if theirs.is_file() and Tokenizer.from_folder(folder).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{folder}: has another tokenizer than {ckpt}; give the --ckpt that it was trained on")
    return Adapter.open(model, Path(folder)).merge(), tokenizer


def save_merged(ckpt: str, folder: Path, out: Path) -> None:
    """Write the checkpoint folder `ckpt` with the adapter of `folder` in its weights: complete or not there."""
    model, tokenizer = open_adapted(ckpt, str(folder))
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    with naming(out):
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        tokenizer.save(temporary)
        shutil.rmtree(out, ignore_errors=True)
        temporary.replace(out)
    print(f"merged: {out}", flush=True)
