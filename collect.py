"""Rejection sampling has moved to distill.py --method answers; this prints the new command."""

from __future__ import annotations

import shlex
import sys

from errors import UserError, command_line

NOW = {"--ckpt": "--teacher", "--keep": "--keep_answers", "--temperature": "--sample_temperature"}


def main() -> None:
    words = []
    for word in sys.argv[1:] or ["--ckpt=DIR", "--data=PROBLEMS", "--out=FILE.jsonl"]:
        name, *value = word.split("=", 1) if word.startswith("--") else [word]
        words += [NOW.get(name, name), *value]
    raise UserError(f"collect.py has moved; run: python distill.py --method answers {shlex.join(words)}")


if __name__ == "__main__":
    command_line(main)
