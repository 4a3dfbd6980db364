"""math-verify in a separate process.

Its own time limits are signals, which only the main thread of a process may use and which cannot stop a product of huge
integers. Here the caller waits, and a process that does not answer in time is killed: from any thread, never a hang.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from queue import Empty, Queue
from typing import IO

from errors import UserError

SECONDS = 3.0
STARTING_SECONDS = 60.0  # importing sympy on a busy machine
MEMORY = 2 << 30  # bytes; 9**9**9 asks for more


class Verifier:
    """Compare two mathematical texts. May be shared by threads; the process starts when first needed.

    Attributes: timeouts: how many questions were given up.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds, self.timeouts = seconds, 0
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def equal(self, expected: str, given: str) -> bool | None:
        """Return whether math-verify takes `given` for `expected`; None when it cannot read one of them in time.

        expected, given: the bare answers, such as `1/2`, `\\frac{1}{2}`, `x=3`. Raises `UserError` when math-verify
        cannot be started.
        """
        with self._lock:
            try:
                self._start()
                self._process.stdin.write(json.dumps([expected, given]) + "\n")
                self._process.stdin.flush()
                return json.loads(self._answers.get(timeout=self.seconds))
            except (Empty, OSError, ValueError):
                self.timeouts += 1
                self.stop()
                return None

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with suppress(OSError):  # a question that it never read is still in the pipe
                self._process.stdin.close()
            self._process = None

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        command, root = [sys.executable, "-m", "text.judging.verifier"], Path(__file__).resolve().parents[2]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._process = subprocess.Popen(command, cwd=root, text=True, **pipes)
        self._answers: Queue[str] = Queue()
        threading.Thread(target=_forward, args=(self._process.stdout, self._answers), daemon=True).start()
        atexit.register(self.stop)
        if not self._answers.get(timeout=STARTING_SECONDS):
            self.stop()
            raise UserError(
                "math-verify does not start; pip install -r requirements.txt, "
                f"or see what {sys.executable} -m text.judging.verifier says"
            )


@lru_cache(maxsize=1)
def shared_verifier() -> Verifier:
    """Return the one verifier of this process."""
    return Verifier()


def _forward(stream: IO[str], answers: Queue[str]) -> None:
    """Put lines into a queue, which can be waited on for a limited time where a pipe cannot (Windows)."""
    with stream:
        for line in stream:
            answers.put(line)
    answers.put("")  # ended: not JSON, so the one who waits learns of it at once


def serve() -> None:
    """Be the other side: answer one JSON value a line, after a first line that says it is ready."""
    from math_verify import parse, verify

    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("null", flush=True)
    for line in sys.stdin:
        equal = None
        with suppress(Exception):  # whatever sympy cannot do is unreadable, no more
            # LaTeX is only read between dollar signs.
            expected, given = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
            equal = bool(verify(expected, given, timeout_seconds=None)) if expected and given else None
        print(json.dumps(equal), flush=True)


if __name__ == "__main__":
    serve()
