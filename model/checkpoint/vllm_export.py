"""A checkpoint folder for vLLM's CPU build with `--enforce-eager`; compiled, vLLM opens any folder of this project."""

from __future__ import annotations

from pathlib import Path

from LMConfig import LMConfig
from model.checkpoint.hf_import import rewrite_folder


def export_vllm_cpu(source: Path, target: Path) -> None:
    """Write the checkpoint folder `source` as `target`, complete or not at all, with YaRN in its config.

    vLLM's CPU kernel for plain RoPE rotates the queries and keys of MLA wrongly. Under YaRN vLLM rotates in PyTorch,
    rightly, and YaRN by a factor of 1 is plain RoPE. Raises as `model.checkpoint.hf_import.import_folder` does.
    """
    config = LMConfig.from_pretrained(source)
    plain = {
        "type": "yarn", "factor": 1.0, "original_max_position_embeddings": config.max_position_embeddings,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    scaling = config.rope_scaling or plain
    rewrite_folder(source, target, rope_scaling=scaling)
    print(f"{target}: for vLLM's CPU build, with YaRN by a factor of {scaling['factor']:g}")
