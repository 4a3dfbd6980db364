"""The server under a crowd, and under lm-eval: no request lost, no slot leaked, memory flat, the same scores.

    python tests/checks/check_server.py --ckpt out/demo/sft/final --questions data/demo/heldout_questions.jsonl

Starts eval/serve.py in float32. For --seconds a crowd of clients asks, streams, hangs up and talks nonsense; every
greedy reply must be the one that the model gives alone. Then lm-eval (`make check-server` installs it) measures the
checkpoint through the server, as `local-completions`, and in process. Ends with code 1 if anything is wrong.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx2 as httpx
import psutil
from check_lm_eval import check

from cli import call
from errors import UserError, command_line
from eval.answering import Answerer
from text.chats.arithmetic import arithmetic_problem

NONSENSE = [
    (b"{", 400), (b"[]", 400), (b'{"model": "none", "messages": [{"role": "user", "content": "a"}]}', 404),
    (b'{"model": "%s", "messages": []}', 400), (b'{"model": "%s", "messages": [{"role": "user", "content": 5}]}', 400),
    (b'{"model": "%s", "temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}', 400),
    (b'{"model": "%s", "messages": [{"role": "user", "content": "' + b"word " * 20_000 + b'"}]}', 400),
]  # fmt: skip
KINDS = ("whole", "whole", "stream", "stream", "leave", "leave at once", "nonsense", "inspect")
TOKENS = 48
GROWTH = 60 * 2**20  # bytes that the server may gain after the first quarter


class Crowd:
    """Clients that do what clients do, each in its thread, and what came of it."""

    def __init__(self, url: str, model: str, expected: dict[str, str]) -> None:
        self.url, self.model, self.expected = url, model, expected
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lock = threading.Lock()

    def run(self, clients: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._client, args=(seed, end)) for seed in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, seed: int, end: float) -> None:
        rng = random.Random(seed)
        with httpx.Client(timeout=300, trust_env=False) as client:
            while time.monotonic() < end:
                kind = rng.choice(KINDS)
                try:
                    problem = getattr(self, f"_{kind.replace(' ', '_')}")(client, rng)
                except Exception as error:  # a request that is lost
                    problem = repr(error)
                with self.lock:
                    self.done[kind] += 1
                    if problem:
                        self.wrong.append(f"{kind}: {problem}")

    def _body(self, rng: random.Random, **more: object) -> tuple[str, dict]:
        question = rng.choice(sorted(self.expected))
        messages = [{"role": "user", "content": question}]
        return question, {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": TOKENS, **more}

    def _whole(self, client: httpx.Client, rng: random.Random, **more: object) -> str:
        question, body = self._body(rng, **more)
        answer = client.post(f"{self.url}/v1/chat/completions", json=body)
        if answer.status_code == 429:
            return "" if answer.headers.get("retry-after") else "429 without Retry-After"
        said = answer.json()["choices"][0]["message"]["content"]
        return "" if said == self.expected[question] else f"{question!r}: {said!r}, not {self.expected[question]!r}"

    def _inspect(self, client: httpx.Client, rng: random.Random) -> str:
        return self._whole(client, rng, inspect=True)

    def _stream(self, client: httpx.Client, rng: random.Random, leave_after: int = -1) -> str:
        question, body = self._body(rng, stream=True)
        said = ""
        with client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as answer:
            if answer.status_code == 429:
                return ""
            for count, line in enumerate(answer.iter_lines()):
                if count == leave_after:
                    return ""
                if line.startswith("data: {"):
                    said += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        return "" if said == self.expected[question] else f"{question!r}: {said!r}, not {self.expected[question]!r}"

    def _leave(self, client: httpx.Client, rng: random.Random) -> str:
        return self._stream(client, rng, leave_after=rng.randrange(1, 12))

    def _leave_at_once(self, client: httpx.Client, rng: random.Random) -> str:
        _, body = self._body(rng, max_tokens=500, temperature=2)
        with suppress(httpx.TimeoutException):
            client.post(f"{self.url}/v1/chat/completions", json=body, timeout=rng.uniform(0.01, 0.3))
        return ""

    def _nonsense(self, client: httpx.Client, rng: random.Random) -> str:
        content, status = rng.choice(NONSENSE)
        content = content.replace(b"%s", self.model.encode())
        headers = {"content-type": "application/json"}
        found = client.post(f"{self.url}/v1/chat/completions", content=content, headers=headers).status_code
        return "" if found == status else f"status {found}, not {status}, for {content[:60]!r}"


def check_server(
    ckpt: str,
    questions: str = "",
    seconds: float = 60,
    clients: int = 64,
    slots: int = 16,
    lm_eval: bool = True,
    count: int = 40,
) -> None:
    """Check a server of one checkpoint.

    Args:
        ckpt: checkpoint folder
        questions: JSONL with question and answer, of which lm-eval's tasks are made too
        seconds: how long the crowd stays
        clients: how many there are
        slots: of the server
        lm_eval: measure through lm-eval too
        count: questions of a subject that lm-eval asks
    """
    rng = random.Random(0)
    asked = [arithmetic_problem(rng, 1 + place % 2)[0] for place in range(20)]
    if questions:
        rows = [json.loads(line) for line in Path(questions).read_text(encoding="utf8").splitlines()]
        asked += [row["question"] for row in rng.sample(rows, min(20, len(rows)))]
    answerer = Answerer.open(ckpt, "cpu", "fp32")
    alone = list(answerer.replies([[{"role": "user", "content": text}] for text in asked], TOKENS))
    command = [sys.executable, "eval/serve.py", "--ckpt", ckpt, "--port", "0", "--dtype", "fp32", "--slots", str(slots)]
    with subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            if not line.startswith("serving "):
                raise UserError("check_server.py: the server did not start")
            model, url = line.split()[1], line.partition(" at ")[2].split()[0].rstrip("/")
            expected, process = dict(zip(asked, alone, strict=True)), psutil.Process(server.pid)
            problems = crowd(url, model, expected, process, seconds, clients)
            if problems:
                print("\n".join(problems[:20]))
                sys.exit(1)
            if lm_eval:
                check(ckpt, questions, count, server=f"{url}/{model}")
        finally:
            server.terminate()


def crowd(
    url: str, model: str, expected: dict[str, str], server: psutil.Process, seconds: float, clients: int
) -> list[str]:
    """Let the crowd in, print what came of it, and return what was wrong."""
    found = Crowd(url, model, expected)
    found.run(clients, seconds / 4)
    before = server.memory_info().rss
    found.run(clients, seconds * 3 / 4)
    time.sleep(1)
    after = server.memory_info().rss
    page = httpx.get(f"{url}/metrics", trust_env=False).text
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    held = [values[f"mini_deepseek_{name}_requests"] for name in ("running", "waiting")]
    problems = list(found.wrong)
    if held != ["0.0", "0.0"]:
        problems.append(f"running and waiting after all have left: {held}")
    if after - before > GROWTH:
        problems.append(f"memory grew from {before >> 20} to {after >> 20} MiB")
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(found.done.items()))
    print(f"{clients} clients, {sum(found.done.values())} requests: {counts}; {len(found.wrong)} wrong; "
          f"memory {before >> 20} -> {after >> 20} MiB; running and waiting {held}")  # fmt: skip
    return problems


if __name__ == "__main__":
    command_line(lambda: call(check_server, __doc__ or ""))
