"""Our speculative decoding against our own plain decoding, greedy, interleaved, on a trained checkpoint with MTP.

python bench/speculative.py --ckpt out/pretrain/final --file heldout.txt [--drafts 1 2 3] [--new 96] [--rounds 5]

The prompts are the first tokens of lines of the file. Each speculative worker first checks that its tokens are those
of plain decoding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
import torch
from harness import SPEED, Verdict

from errors import UserError, command_line
from model import MiniDeepSeek
from model.decoding.generate import stream
from model.decoding.native import Drafter
from model.decoding.sampling import GREEDY
from model.decoding.speculative import stream_speculative
from text.tokenizer import Tokenizer
from training.machine import DTYPES

PER_PASS, ACCEPTED = "tokens a pass", "drafts accepted"


def main() -> None:
    parser = harness.parser_of(__doc__, prompts=8, prompt=24, new=96)
    parser.add_argument("--ckpt", required=True, help="checkpoint folder with an MTP layer")
    parser.add_argument("--file", required=True, help="UTF-8 text like that of its training")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3], help="the most drafts a pass")
    options = parser.parse_args()
    if options.worker is not None:
        work(options)
        return
    workers = {"plain": "0", **{f"drafts: at most {most}": str(most) for most in options.drafts}}
    plain, *ours = harness.measured(workers, options.rounds)
    title = (
        f"speculative decoding of {options.ckpt}, {options.dtype}, {options.prompts} prompts, {options.new} new tokens "
        f"each, greedy, one row, the same tokens; medians of {options.rounds}"
    )
    facts = {}
    for most, one in zip(options.drafts, ours, strict=True):
        shares = ", ".join(f"{one.median(f'draft {place}'):.0%}" for place in range(1, most + 1))
        facts[f"accepted of the drafts in each place, {one.name}"] = shares
    verdicts = [Verdict.between(one, plain, SPEED, f"{SPEED}, {one.name}") for one in ours]
    columns = {SPEED: "{:,.0f}", PER_PASS: "{:.2f}", ACCEPTED: "{:.0%}"}
    harness.report(title, [plain, *ours], columns, verdicts, facts, options.json)


def work(options: argparse.Namespace) -> None:
    """Decode all prompts in this process, once for each line on stdin."""
    device, most = harness.device_of(options.device), int(options.worker)
    model = MiniDeepSeek.from_pretrained(options.ckpt, dtype=DTYPES[options.dtype]).to(device).eval()
    starts = prompts(Tokenizer.from_folder(options.ckpt), Path(options.file), options.prompts, options.prompt)
    starts = [prompt.to(device) for prompt in starts]

    drafter = Drafter(model) if device.type == "cpu" else None

    def decode(prompt: torch.Tensor, passes: list[tuple[int, int]] | None) -> list[int]:
        if passes is None:
            return [int(token) for token in stream(model, prompt, options.new, GREEDY)]
        made = dict(accepted=passes, draft_tokens=most, drafter=drafter)
        return list(stream_speculative(model, prompt, options.new, **made))

    if most and any(decode(prompt, []) != decode(prompt, None) for prompt in starts):
        raise SystemExit("error: speculative decoding gave other tokens than plain decoding")

    def measure() -> dict[str, float]:
        passes: list[tuple[int, int]] = []
        start = harness.now(device)
        count = sum(len(decode(prompt, passes if most else None)) for prompt in starts)
        return {SPEED: count / (harness.now(device) - start), **acceptance(passes, most)}

    harness.serve(measure, device)


def acceptance(passes: list[tuple[int, int]], most: int) -> dict[str, float]:
    """Tokens a pass, the accepted share of all drafts, and that share for each place in the chain.

    A draft counts wherever it was made, also behind one that was wrong. passes: of each (drafts accepted, drafts made).
    """
    accepted, drafted = sum(right for right, _ in passes), sum(made for _, made in passes)
    result = {PER_PASS: 1 + accepted / max(len(passes), 1), ACCEPTED: accepted / max(drafted, 1)}
    for place in range(1, most + 1):
        made = sum(drafts >= place for _, drafts in passes)
        result[f"draft {place}"] = sum(right >= place for right, _ in passes) / max(made, 1)
    return result


def prompts(tokenizer: Tokenizer, file: Path, count: int, length: int) -> list[torch.Tensor]:
    """Return the first `length` tokens of long enough lines, spread over the file, each (1, 1 + length)."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a text file")
    lines = [tokenizer.encode(line) for line in file.read_text(encoding="utf8").splitlines()]
    lines = [ids for ids in lines if len(ids) >= length]
    if len(lines) < count:
        raise UserError(f"{file}: {len(lines)} lines of {length} tokens or more; lower --prompts or --prompt")
    chosen = lines[:: len(lines) // count][:count]
    return [torch.tensor([[tokenizer.eos_id, *ids[:length]]]) for ids in chosen]


if __name__ == "__main__":
    command_line(main)
