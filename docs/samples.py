"""Ask the models of a run of `make demo` the questions of the README and docs again, and write their answers there.

python docs/samples.py [--check]      --check writes nothing and fails where an answer differs

A code block below `<!-- sample: CHECKPOINT -->` has questions, each after `> ` with its answer in the next line, or as
`"content": "..."` with its answer in the next line that begins with `# `.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- sample: (\S+) -->\n```\w*\n(.*?)```", re.DOTALL)
QUESTION = re.compile(r'> (.+)|.*"content": "([^"]+)"')


def answer(checkpoint: str, question: str) -> str:
    """Return what eval/chat.py says at temperature 0."""
    command = [sys.executable, "eval/chat.py", "--ckpt", checkpoint, "--once", question, "--temperature", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else sys.exit(done.stderr.strip())


def renewed(page: str, ask: Callable[[str, str], str]) -> str:
    """Return a page with the answers that `ask(checkpoint, question)` gives in its sample blocks."""

    def block(match: re.Match) -> str:
        lines, place = match[2].splitlines(), 0
        while place < len(lines):
            if question := QUESTION.match(lines[place]):
                mark = "" if question[1] else "# "
                place = next(number for number in range(place + 1, len(lines)) if lines[number].startswith(mark))
                lines[place] = mark + ask(match[1], question[1] or question[2])
            place += 1
        return match[0].replace(match[2], "\n".join(lines) + "\n")

    return BLOCK.sub(block, page)


def main() -> None:
    """Renew all pages, or compare them."""
    parser = argparse.ArgumentParser(description="Renew the sample answers of README and docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where an answer differs")
    check, old = parser.parse_args().check, []
    for page in sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")]):
        text = page.read_text(encoding="utf8")
        if (new := renewed(text, answer)) != text:
            old.append(page.relative_to(ROOT).as_posix())
            if not check:
                page.write_text(new, encoding="utf8")
    print(f"{'differ' if check else 'renewed'}: {', '.join(old) or 'none'}")
    sys.exit(check and bool(old))


if __name__ == "__main__":
    main()
