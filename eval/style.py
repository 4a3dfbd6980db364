"""Preferred style: how many of a checkpoint's answers begin and end as the preferred ones do.

python eval/style.py --ckpt out/demo/dpo/final --file data/demo/heldout_favours.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cli import call
from errors import UserError, check_seed, command_line
from eval.answering import Answerer
from eval.questions import Question, ask, read_lines
from model.decoding.sampling import Sampling
from text.files import json_text


@dataclass(frozen=True)
class PoliteRequest:
    """One line of the file: `question`, the preferred `answer`, and what answers of its style begin and end with."""

    question: str
    answer: str
    opening: str
    closing: str


def in_style(reply: str, request: PoliteRequest) -> bool:
    """Return whether a reply has both ends of the style, white space aside; something must stand between them."""
    reply, opening, closing = reply.strip(), request.opening.strip(), request.closing.strip()
    middle = reply[len(opening) : len(reply) - len(closing)]
    return reply.startswith(opening) and reply.endswith(closing) and bool(middle.strip())


def read_polite_requests(path: Path) -> list[PoliteRequest]:
    """Read JSONL with `question`, `answer`, `opening` and `closing`."""
    names = ("question", "answer", "opening", "closing")
    return read_lines(path, lambda row: PoliteRequest(*(str(row[name]) for name in names)), ", ".join(names))


def score_style(
    answerer: Answerer, requests: list[PoliteRequest], temperature: float = 0.7, seed: int = 0
) -> dict[str, float]:
    """Return the shares of answers in the style, and of those that are the preferred answer, of so many answers.

    Answers are sampled as in a chat: greedy ones would show which style is likelier, not how likely it is.
    """
    asked = [Question(request.question, request.answer, "request") for request in requests]
    results = ask(answerer, asked, Sampling(temperature=temperature), seed)
    styled = sum(in_style(result.reply, request) for result, request in zip(results, requests, strict=True))
    exact = sum(result.correct for result in results)
    return {"preferred": styled / len(requests), "exact": exact / len(requests), "answers": len(requests)}


def style(
    ckpt: str,
    file: str,
    temperature: float = 0.7,
    seed: int = 0,
    json: bool = False,
    lora: str = "",
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Print the share of answers in the preferred style.

    Args:
        ckpt: checkpoint folder
        file: JSONL with question, answer, opening and closing
        temperature: of the sampling, as in eval/chat.py; 0 takes the likeliest token
        seed: of the sampling
        json: print one JSON object instead of a sentence
        lora: folder of an adapter that lora_sft.py made for this checkpoint
        device: auto, cpu or cuda
        dtype: auto, bf16 or fp32
    """
    check_seed(seed)
    if temperature < 0:
        raise UserError(f"--temperature {temperature}: must be at least 0")
    score = score_style(Answerer.open(ckpt, device, dtype, lora), read_polite_requests(Path(file)), temperature, seed)
    if json:
        print(json_text(score))
    else:
        print("{preferred:.1%} of {answers} answers in the preferred style, {exact:.1%} to the letter".format(**score))


if __name__ == "__main__":
    command_line(lambda: call(style, __doc__ or ""))
