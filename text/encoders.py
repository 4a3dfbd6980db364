"""Several processes that turn batches of documents into tokens, in order."""

from __future__ import annotations

import array
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from errors import UserError

# More cores than this are used by threads inside the processes, so that memory does not grow with the machine.
MAX_PROCESSES = 4
# Batches under way for each process: one it works on and two that wait, so that it never does.
QUEUED = 3

Batch = TypeVar("Batch")


class Encoded(NamedTuple):
    """Tokens of a batch: all documents joined, each ended by `</s>` (tokens,) uint16; tokens of each (documents,)."""

    tokens: np.ndarray
    lengths: np.ndarray


class EncoderPool:
    """Processes that each hold the tokenizer of a folder and nothing else.

    They are `python -m text.encoders` behind pipes and not `multiprocessing`: fork is not safe once the tokenizer's
    threads run, and spawn would import the main script, torch with it, into each (300 MB instead of 60). `workers=0`
    uses all cores. A context manager; leaving it ends the processes.
    """

    def __init__(self, tokenizer_folder: Path, workers: int = 0) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = workers or min(cores, MAX_PROCESSES)
        threads = 1 if workers else max(1, cores // self.workers)
        root = str(Path(__file__).resolve().parent.parent)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
            "RAYON_NUM_THREADS": str(threads),
        }
        command = [sys.executable, "-m", "text.encoders", str(tokenizer_folder)]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            for _ in range(self.workers)
        ]
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._peaks: dict[int, int] = {}
        # One thread a process does no more than wait for it.
        self._threads = ThreadPoolExecutor(self.workers)

    @property
    def peak_memory(self) -> int:
        """Sum of the processes' peak resident memory so far, in bytes."""
        return sum(self._peaks.values())

    def map(self, batches: Iterable[tuple[Batch, list[bytes]]]) -> Iterator[tuple[Batch, Encoded]]:
        """Encode the UTF-8 documents of each (label, documents); gives (label, tokens) in the order of the batches."""
        waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
        for label, documents in batches:
            waiting.append((label, self._threads.submit(self._encode, documents)))
            if len(waiting) >= QUEUED * self.workers:
                label, future = waiting.popleft()
                yield label, future.result()
        while waiting:
            label, future = waiting.popleft()
            yield label, future.result()

    def _encode(self, documents: list[bytes]) -> Encoded:
        process = self._idle.get()
        try:
            pickle.dump(documents, process.stdin)
            process.stdin.flush()
            tokens, lengths, self._peaks[process.pid] = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise UserError(
                f"a tokenising process ended by itself (exit code {process.wait()}; -9 means out of memory); "
                "run the same command again, with fewer workers: finished shards are kept"
            ) from error
        finally:
            self._idle.put(process)  # a dead one too, or the next thread would wait for ever
        return Encoded(np.frombuffer(tokens, np.uint16), np.frombuffer(lengths, np.uint32))

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            with suppress(BrokenPipeError):  # what was still to be written is for nobody
                process.stdin.close()
            process.stdout.close()
            process.wait()


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        # Not getrusage: a child's figure there begins with what its parent had.
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _serve(folder: str) -> None:
    """Answer each pickled list of documents on stdin with their tokens, until stdin ends."""
    import signal

    from text.tokenizer import Tokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not print into the answers
    tokenizer = Tokenizer.from_folder(folder)
    end = [tokenizer.eos_id]
    while True:
        try:
            documents = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        tokens, lengths = array.array("H"), array.array("I")
        for ids in tokenizer.encode_batch([document.decode("utf-8") for document in documents]):
            tokens.extend(ids)
            tokens.extend(end)
            lengths.append(len(ids) + 1)
        pickle.dump((tokens.tobytes(), lengths.tobytes(), peak_memory()), answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
