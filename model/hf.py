"""Checkpoint folders in and out, from other programs and for them.

python -m model.hf import --from DIR --to DIR          any deepseek_v3 folder becomes one of this project's
python -m model.hf export --format gguf --ckpt DIR --out FILE.gguf [--type f32|f16|bf16|q8_0]      for llama.cpp
python -m model.hf export --format vllm-cpu --ckpt DIR --out DIR      for vLLM on CPUs with --enforce-eager
python -m model.hf card DIR [DIR...]                   write or renew README.md, the model card of checkpoint folders
python -m model.hf push DIR owner/name [--private]                    to the Hugging Face hub, with its model card
"""

from __future__ import annotations

import argparse
from pathlib import Path

from errors import UserError, command_line
from model.checkpoint.card import write_card
from model.checkpoint.folder import CARD
from model.checkpoint.gguf_export import export_gguf
from model.checkpoint.hf_import import export_vllm_cpu, import_folder
from model.checkpoint.hub import push


def main() -> None:
    """Run the command line of `python -m model.hf`."""
    parser = argparse.ArgumentParser(prog="python -m model.hf", description="Checkpoint folders in and out.")
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="make any deepseek_v3 folder one of this project's (float32, one file)")
    into.add_argument("--from", dest="source", type=Path, required=True, help="folder to read; FP8 is dequantised")
    into.add_argument("--to", dest="target", type=Path, required=True, help="folder to write")
    out = commands.add_parser("export", help="write a checkpoint for other programs")
    formats = "gguf: llama.cpp; vllm-cpu: vLLM on CPUs with --enforce-eager (else it opens the checkpoint folder)"
    out.add_argument("--format", choices=["gguf", "vllm-cpu"], required=True, help=formats)
    out.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder")
    out.add_argument("--out", type=Path, required=True, help="file to write; for vllm-cpu a folder")
    out.add_argument("--type", choices=["f32", "f16", "bf16", "q8_0"], help="of gguf's matrices (f16)")
    cards = commands.add_parser("card", help="write or renew README.md, the model card; an edited one stays as it is")
    cards.add_argument("folders", type=Path, nargs="+", help="checkpoint folders, such as OUT/final")
    hub = commands.add_parser("push", help="upload a checkpoint folder to the Hugging Face hub, without training state")
    hub.add_argument("folder", type=Path, help="checkpoint folder, such as OUT/final")
    hub.add_argument("name", help="repository, owner/name; made where there is none")
    hub.add_argument("--private", action="store_true", help="make it private; refused where it is public already")
    hub.add_argument("--token", default="", help="that may write; left out: HF_TOKEN, or that of `hf auth login`")
    options = parser.parse_args()
    if options.command == "import":
        import_folder(options.source, options.target)
    elif options.command == "card":
        for folder in options.folders:
            print(f"{folder / CARD}: {'written' if write_card(folder) else 'was edited and stays as it is'}")
    elif options.command == "push":
        push(options.folder, options.name, options.private, options.token)
    elif options.format == "vllm-cpu":
        if options.type:
            raise UserError("--type: is of --format gguf; leave it out")
        export_vllm_cpu(options.ckpt, options.out)
    else:
        export_gguf(options.ckpt, options.out, options.type or "f16")


if __name__ == "__main__":
    command_line(main)
