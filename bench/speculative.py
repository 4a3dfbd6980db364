"""Our speculative decoding against our own plain decoding, greedy, in turn, on a trained checkpoint with an MTP layer.

python bench/speculative.py --ckpt out/pretrain/final --file heldout.txt [--drafts 1 2 3] [--new 96] [--rounds 5]

The prompts are the first tokens of lines of the file. Each speculative worker first checks that its tokens are those
of plain decoding.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from device import add_device, device_of, now
from side_by_side import Contender, compare, findings, serve, verdict

from errors import UserError, command_line
from model import MiniDeepSeek
from model.decoding.generate import stream
from model.decoding.native import Drafter
from model.decoding.sampling import Sampling
from model.decoding.speculative import stream_speculative
from text.tokenizer import Tokenizer
from training.machine import DTYPES

GREEDY = Sampling(temperature=0.0)


def main() -> None:
    options = parse()
    if options.worker is not None:
        work(options)
        return
    own = {"drafts", "json", "worker", "rounds"}
    command = [__file__, *(f"--{name}={value}" for name, value in vars(options).items() if name not in own)]
    plain = Contender("plain", [*command, "--worker=0"])
    ours = [Contender(f"drafts: at most {most}", [*command, f"--worker={most}"]) for most in options.drafts]
    compare([plain, *ours], options.rounds)
    found = findings(
        f"speculative decoding of {options.ckpt}, {options.dtype}, {options.prompts} prompts, {options.new} new tokens "
        f"each, greedy, one row, the same tokens; medians of {options.rounds}",
        [plain, *ours],
    )
    found.verdicts = [replace(verdict(one, plain, "tokens/s"), quantity=f"tokens/s, {one.name}") for one in ours]
    found.show({"tokens/s": "{:,.0f}", "tokens a pass": "{:.2f}", "drafts kept": "{:.0%}"})
    for most, one in zip(options.drafts, ours, strict=True):
        kept = ", ".join(f"{one.median(f'draft {place}'):.0%}" for place in range(1, most + 1))
        found.facts[f"kept of the drafts in each place, {one.name}"] = kept
    found.save(options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="checkpoint folder with an MTP layer")
    parser.add_argument("--file", required=True, help="UTF-8 text like that of its training")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3], help="the most drafts a pass")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    for name, default in {"prompts": 8, "prompt": 24, "new": 96, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    add_device(parser)
    parser.add_argument("--json", help="write the measurements to this file")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def work(options: argparse.Namespace) -> None:
    """Decode all prompts in this process, once for each line on stdin."""
    device = device_of(options.device)
    model = MiniDeepSeek.from_pretrained(options.ckpt, dtype=DTYPES[options.dtype]).to(device).eval()
    starts = prompts(Tokenizer.from_folder(options.ckpt), Path(options.file), options.prompts, options.prompt)
    starts = [prompt.to(device) for prompt in starts]

    drafter = Drafter(model) if device.type == "cpu" else None

    def plain(prompt: torch.Tensor) -> list[int]:
        return [int(token) for token in stream(model, prompt, options.new, GREEDY)]

    def speculative(prompt: torch.Tensor, passes: list[tuple[int, int]]) -> list[int]:
        most = options.worker
        return list(stream_speculative(model, prompt, options.new, (), passes, most, GREEDY, None, drafter))

    if options.worker:
        for prompt in starts:
            if speculative(prompt, []) != plain(prompt):
                raise SystemExit("error: speculative decoding gave other tokens than plain decoding")

    def measure() -> dict[str, float]:
        passes: list[tuple[int, int]] = []
        start = now(device)
        count = sum(len(speculative(prompt, passes) if options.worker else plain(prompt)) for prompt in starts)
        speed = {"tokens/s": count / (now(device) - start)}
        return speed | (acceptance(passes, options.worker) if passes else {"tokens a pass": 1.0, "drafts kept": 0.0})

    serve(measure, device)


def acceptance(passes: list[tuple[int, int]], most: int) -> dict[str, float]:
    """Tokens a pass, the share of all drafts that was kept, and that share for each place in the chain.

    A draft counts wherever it was made, also behind one that was wrong.

    Args:
        passes: of each the drafts kept, and the drafts made.
    """
    kept, drafted = (sum(numbers) for numbers in zip(*passes, strict=True))
    result = {"tokens a pass": 1 + kept / len(passes), "drafts kept": kept / max(drafted, 1)}
    for place in range(1, most + 1):
        made = sum(drafts >= place for _, drafts in passes)
        result[f"draft {place}"] = sum(right >= place for right, _ in passes) / max(made, 1)
    return result


def prompts(tokenizer: Tokenizer, file: Path, count: int, length: int) -> list[torch.Tensor]:
    """The first `length` tokens of long enough lines, spread over the file, each (1, 1 + length)."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a text file")
    lines = [tokenizer.encode(line) for line in file.read_text(encoding="utf8").splitlines()]
    lines = [ids for ids in lines if len(ids) >= length]
    if len(lines) < count:
        raise UserError(f"{file}: {len(lines)} lines of {length} tokens or more; lower --prompts or --prompt")
    chosen = lines[:: len(lines) // count][:count]
    return [torch.tensor([[tokenizer.eos_id, *ids[:length]]]) for ids in chosen]


if __name__ == "__main__":
    sys.exit(command_line(main))
