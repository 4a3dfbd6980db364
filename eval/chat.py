"""Talk to a checkpoint in the terminal.

    python eval/chat.py --ckpt out/sft/final
    python eval/chat.py --ckpt out/sft/final --once "你好" --temperature 0
    python eval/chat.py --ckpt out/sft/final --lora out/lora/final

Commands while talking: /reset forgets the conversation, /system TEXT sets the system prompt, /quit ends.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from io import TextIOWrapper

from cli import call
from errors import UserError, check_least, check_seed, command_line
from eval.answering import Answerer
from model.decoding.sampling import Sampling
from text.chats.chat_template import Message

UNREADABLE = "\ufffd"  # in place of bytes that are not a character
HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /quit ends"


@dataclass
class Conversation:
    """The messages so far, and the answerer that continues them."""

    answerer: Answerer
    system: str
    sampling: Sampling
    max_new_tokens: int
    seed: int | None
    speculative: bool
    draft_tokens: int = 0
    messages: list[Message] = field(default_factory=list)

    def ask(self, question: str) -> None:
        """Print the answer as it comes, then the speed on stderr; both turns join the history."""
        asked: list[Message] = [*self.messages, {"role": "user", "content": question}]
        prompt: list[Message] = [{"role": "system", "content": self.system}, *asked] if self.system else asked
        answer, count, start = "", 0, time.perf_counter()
        passes: list[tuple[int, int]] = []
        pieces = self.answerer.stream_reply(
            prompt, self.sampling, self.max_new_tokens, self.seed, self.speculative, self.draft_tokens, passes
        )
        try:
            for piece, count in pieces:  # noqa: B007
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass  # the person has read enough; what was said stays in the history
        print()
        seconds = time.perf_counter() - start
        speed = f"{count} tokens, {count / max(seconds, 1e-9):.1f} tok/s"
        if passes:
            accepted, drafted = (sum(numbers) for numbers in zip(*passes, strict=True))
            speed += f", {accepted} of {drafted} drafts accepted ({accepted / drafted:.0%})"
        print(f"[{speed}]", file=sys.stderr)
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def command(self, line: str) -> bool:
        """Obey a line that starts with '/'. Returns False when the person wants to leave."""
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        if name == "/reset":
            self.messages = []
            print("(forgotten)")
        elif name == "/system":
            self.system, self.messages = rest.strip(), []
            print(f"(system prompt: {self.system or 'none'})")
        else:
            print(HELP)
        return True


def chat(
    ckpt: str,
    once: str = "",
    system: str = "",
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.9,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    max_new_tokens: int = 256,
    seed: int | None = None,
    speculative: bool = False,
    draft_tokens: int = 0,
    lora: str = "",
    quantize: str = "",
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Talk to a checkpoint in the terminal.

    Args:
        ckpt: checkpoint folder
        once: answer this one question and end
        system: system prompt
        temperature: 0 always takes the likeliest token
        top_k: keep the k likeliest tokens; 0 is off
        top_p: keep the likeliest tokens up to this much probability; 1 is off
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 is off
        repetition_penalty: above 1, repeats become less likely
        max_new_tokens: longest answer, in tokens
        seed: makes sampling repeatable
        speculative: draft with the MTP layers: the same greedy tokens, or sampled ones of the same distribution
        draft_tokens: the most drafts a pass with --speculative; 0 means one for each MTP layer
        lora: folder of an adapter that lora_sft.py made for this checkpoint
        quantize: int8 keeps the matrices of the layers in 8 bits; empty keeps them as they are
        device: auto, cpu or cuda
        dtype: auto, bf16 or fp32
    """
    try:
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    except ValueError as error:
        raise UserError(f"chat.py: {error}") from None
    check_seed(seed)
    check_least(0, draft_tokens=draft_tokens)
    check_least(1, max_new_tokens=max_new_tokens)
    answerer = Answerer.open(ckpt, device, dtype, lora, quantize)
    talk = Conversation(answerer, system, sampling, max_new_tokens, seed, speculative, draft_tokens)
    if once:
        talk.ask(once)
        return
    print(f"Mini DeepSeek-V3, {ckpt}. {HELP}.")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if UNREADABLE in line:
            print(f"error: not all of this is {sys.stdin.encoding}; set the terminal to UTF-8", file=sys.stderr)
        elif line.startswith("/"):
            if not talk.command(line):
                return
        elif line:
            try:
                talk.ask(line)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    command_line(lambda: call(chat, __doc__ or ""))
