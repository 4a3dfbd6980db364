"""Our server beside llama.cpp's and transformers' on the same weights: throughput, and the time to the first text.

python bench/serve.py --tokenizer out/demo/tokenizer [--preset 64m] [--clients 1 4 16] [--new 32] [--rounds 3]
python bench/serve.py --ckpt out/demo/sft/final

Clients stream completions over HTTP, each its next one when the last has ended. Prompts differ, and no reply ends
before its last token (the end token's row of the head is 0). All servers run, one is asked at a time. A baseline that
is not installed is left out: pip install 'llama-cpp-python[server]', 'transformers[serving]'. llama.cpp's own
`llama-server`, which has slots as ours has, is taken from PATH; llama-cpp-python's source has it in vendor/llama.cpp.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import harness
import httpx2 as httpx
import psutil
import torch
from harness import MEMORY, SPEED, Contender, Verdict

from errors import UserError, command_line
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.checkpoint.gguf_export import export_gguf
from text.chats.arithmetic import arithmetic_problem
from text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
REQUESTS, FIRST, LATE = "requests/s", "first text, ms", "first text, p95, ms"
MEASURES = {SPEED: "{:,.0f}", REQUESTS: "{:.2f}", FIRST: "{:,.0f}", LATE: "{:,.0f}"}
NAMES = {"fp32": ("float32", "f32"), "bf16": ("bfloat16", "bf16")}  # transformers' and llama.cpp's
# Baseline -> the packages or programs it needs.
PEERS = {
    "llama.cpp": ("llama_cpp", "sse_starlette", "starlette_context"),
    "llama-server": ("llama-server",),
    "transformers": ("transformers", "fastapi", "openai"),
    "transformers, continuous batching": ("transformers", "fastapi", "openai"),
}
GGUF, START = "model.gguf", 600  # seconds that a server has to start


def main() -> None:
    parser = harness.parser_of(__doc__, dtype="fp32", rounds=3, requests=8, prompt=32, new=32, slots=16)
    parser.add_argument("--ckpt", help="checkpoint folder; without it, random weights of --preset")
    parser.add_argument("--tokenizer", default="out/demo/tokenizer", help="folder of the tokenizer of random weights")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="how many ask at a time")
    parser.add_argument(
        "--peers", nargs="*", default=["llama.cpp", "llama-server", "transformers"], choices=list(PEERS)
    )
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    names = {"ours": "ours", **{peer: peer for peer in options.peers if installed(peer)}}
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, Path(folder), with_gguf=not names.keys().isdisjoint({"llama.cpp", "llama-server"}))
        ours, *baselines = harness.measured(names, options.rounds, folder)
    what = options.ckpt or f"{options.preset}, random weights"
    title = (
        f"serving {what}, {options.dtype}; prompts of about {options.prompt} tokens, {options.new} new ones, at least "
        f"{options.requests} requests a measurement; medians of {options.rounds}"
    )
    table([ours, *baselines], options.clients)
    keys = [key(clients, SPEED) for clients in options.clients]
    verdicts = [Verdict.between(ours, one, name) for one in baselines for name in keys]
    harness.report(title, [ours, *baselines], {MEMORY: "{:,.0f}"}, verdicts, {}, options.json)


def installed(peer: str) -> bool:
    missing = [needed for needed in PEERS[peer] if not (find_spec(needed) or shutil.which(needed))]
    if missing:
        print(f"notice: {peer} is left out: {', '.join(missing)} not installed", file=sys.stderr)
    return not missing


def prepare(options: argparse.Namespace, folder: Path, with_gguf: bool) -> None:
    """Write the checkpoint folder to be served, whose replies never end by themselves, and its GGUF file."""
    if options.ckpt:
        tokenizer, model = Tokenizer.from_folder(options.ckpt), MiniDeepSeek.from_pretrained(options.ckpt)
    else:
        tokenizer = Tokenizer.from_folder(options.tokenizer)
        torch.manual_seed(0)
        model = MiniDeepSeek(LMConfig.preset(options.preset, num_nextn_predict_layers=0))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_id] = 0  # a logit of 0 is never the largest of thousands
    model.save_pretrained(folder)
    tokenizer.save(folder)
    if with_gguf:
        export_gguf(folder, folder / GGUF, NAMES[options.dtype][1])


def work(options: argparse.Namespace) -> None:
    """Keep one server running; ask it once for each line on stdin, with each number of clients."""
    tokenizer = Tokenizer.from_folder(options.folder)
    with running(options) as (server, url):
        name = options.folder
        if not options.worker.startswith("transformers"):
            name = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]

        def measure() -> dict[str, float]:
            found = {}
            for clients in options.clients:
                asked = prompts(tokenizer, max(options.requests, clients), options.prompt)
                start = time.perf_counter()
                firsts = asyncio.run(crowd(url, name, asked, clients, options.new))
                seconds = time.perf_counter() - start
                for measure, value in summary(firsts, options.new, seconds).items():
                    found[key(clients, measure)] = value
            return {**found, MEMORY: server.memory_info().rss / 2**20}

        harness.serve(measure, torch.device("cpu"), warm_up=1)


@contextmanager
def running(options: argparse.Namespace) -> Iterator[tuple[psutil.Process, str]]:
    """Start the server of `options.worker` on a free port, wait until it answers, and end it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    threads, (type_name, _) = str(torch.get_num_threads()), NAMES[options.dtype]
    context = options.prompt * 2 + options.new + 64
    peer = [sys.executable, "-m", "transformers.cli.transformers", "serve", options.folder, "--dtype", type_name]
    commands = {
        "ours": [
            sys.executable, "eval/serve.py", "--ckpt", options.folder, "--dtype", options.dtype, "--slots",
            str(options.slots),
        ],
        "llama.cpp": [
            sys.executable, "-m", "llama_cpp.server", "--model", str(Path(options.folder) / GGUF),
            "--n_threads", threads, "--n_threads_batch", threads, "--verbose", "False",
            "--n_ctx", str(context),
            "--interrupt_requests", "False",  # else each request ends the one before it
        ],
        "llama-server": [
            "llama-server", "--model", str(Path(options.folder) / GGUF), "--threads", threads,
            "--parallel", str(options.slots), "--ctx-size", str(options.slots * context),
            "--no-cache-prompt",  # each measurement asks the same prompts
        ],
        "transformers": [*peer, "--device", "cpu"],
        "transformers, continuous batching": [*peer, "--device", "cpu", "--continuous-batching"],
    }  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    command = [*commands[options.worker], "--host", "127.0.0.1", "--port", port]
    with open(os.devnull, "w") as nowhere:
        server = subprocess.Popen(command, cwd=ROOT, env=env, stdout=nowhere, stderr=nowhere)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, server)
        yield psutil.Process(server.pid), url
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Wait for any answer but "loading": the list of models of transformers' own server fails without a hub's cache."""
    until = time.monotonic() + START
    with httpx.Client(trust_env=False, verify=False) as client:
        while time.monotonic() < until and server.poll() is None:
            with suppress(httpx.TransportError):
                if client.get(f"{url}/v1/models").status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    return
            time.sleep(0.5)
    raise UserError(f"the server did not start: {' '.join(map(str, server.args))}")


def prompts(tokenizer: Tokenizer, count: int, tokens: int) -> list[str]:
    """Return texts that differ from their beginning on, each of at least so many tokens."""
    rng, texts = random.Random(0), []
    while len(texts) < count:
        text = ""
        while len(tokenizer.encode(text)) < tokens:
            text += arithmetic_problem(rng, 3)[0] + "\n"
        texts.append(text)
    return texts


async def crowd(url: str, model: str, texts: Sequence[str], clients: int, new: int) -> list[float]:
    """Ask for all completions, so many at a time; return the seconds from each request to its first text."""
    left, firsts = iter(texts), []
    # llama-server closes a connection that is kept just as the next request comes: each has one of its own.
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=None, trust_env=False, verify=False, limits=limits) as client:

        async def ask() -> None:
            for text in left:
                firsts.append(await stream(client, url, model, text, new))

        await asyncio.gather(*(ask() for _ in range(clients)))
    return firsts


async def stream(client: httpx.AsyncClient, url: str, model: str, text: str, new: int) -> float:
    body = {"model": model, "prompt": text, "max_tokens": new, "temperature": 0, "stream": True}
    start, first, finish = time.perf_counter(), 0.0, None
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if answer.status_code != 200:
                raise UserError(f"{url}: {answer.status_code} {line}")
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                if choice["text"] and not first:
                    first = time.perf_counter() - start
                finish = choice.get("finish_reason") or finish
    if finish != "length":
        raise UserError(f"{url}: a reply ended by {finish!r}, not by its length; its tokens cannot be counted")
    return first or time.perf_counter() - start


def summary(firsts: Sequence[float], new: int, seconds: float) -> dict[str, float]:
    first = sorted(seconds * 1000 for seconds in firsts)
    late = first[min(len(first) - 1, int(0.95 * len(first)))]
    speed = len(first) / seconds
    return {SPEED: new * speed, REQUESTS: speed, FIRST: statistics.median(first), LATE: late}


def key(clients: int, measure: str) -> str:
    return f"{measure} ({clients} client{'s' * (clients > 1)})"


def table(contenders: Sequence[Contender], clients: Sequence[int]) -> None:
    """Print medians (smallest - largest) of each measure."""
    print(f"| clients | server | {' | '.join(MEASURES)} |\n|---|---|{'---|' * len(MEASURES)}")
    for count in clients:
        for one in contenders:
            cells = []
            for measure, form in MEASURES.items():
                values = one.values(key(count, measure))
                middle, low, high = (form.format(pick(values)) for pick in (statistics.median, min, max))
                cells.append(f"{middle} ({low} - {high})")
            print(f"| {count} | {one.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    command_line(main)
