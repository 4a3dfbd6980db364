"""Serve checkpoints: OpenAI's endpoints, and a page to talk to them and look inside.

    python eval/serve.py --ckpt out/demo/sft/final
    python eval/serve.py --ckpt out/demo/sft/final,out/demo/grpo/final --port 8000 --api_key secret
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "sft", "messages": [{"role": "user", "content": "你好"}]}'

docs/serving.md describes it. A model is named by the folder of its run: out/demo/sft/final is sft.
"""

from __future__ import annotations

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn

from cli import call
from errors import UserError, check_least, command_line, waiting
from eval.answering import Answerer
from eval.serving.app import create_app
from eval.serving.metrics import Metrics
from eval.serving.worker import Worker

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CHECKPOINT = re.compile(r"final(-ema)?|step-\d+|best")
FAREWELL = 5  # seconds that replies have to end


def serve(
    ckpt: str,
    lora: str = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str = "",
    cors: str = "",
    slots: int = 16,
    queue: int = 256,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Serve checkpoints: OpenAI's endpoints, and a page to talk to them.

    Args:
        ckpt: checkpoint folder, or several separated by commas: each is a model, named by the folder of its run
        lora: folder of an adapter of one of them, or several: each is one model more
        host: address to listen on; 0.0.0.0 is every one of this machine
        port: 0 takes any that is free
        api_key: what clients must send as their key; empty: none
        cors: origins whose pages may use the server, separated by commas; * is any
        slots: replies of a model that are generated at a time
        queue: requests that may wait for a slot; more are refused with 429
        device: auto, cpu or cuda
        dtype: auto, bf16 or fp32
    """
    check_least(1, slots=slots)
    check_least(0, queue=queue, port=port)
    folders = paths(ckpt)
    if not folders:
        raise UserError("--ckpt: names no folder")
    bases = [(folder, "") for folder in folders] + [(base_of(one, folders), one) for one in paths(lora)]
    listening = listen(host, port)
    hosts = [*LOOPBACK, host] if host in LOOPBACK else ["*"]
    # In a thread that ends, and OpenMP's threads with it: with more of those than cores they would sleep where they
    # wait, not spin, and the worker would need 1.6 times as long for a token.
    with ThreadPoolExecutor(max_workers=1) as loader:
        answerers = loader.submit(load, bases, device, dtype).result()
        worker = loader.submit(Worker, answerers, slots, queue, Metrics()).result()
    app = create_app(worker, api_key, [origin for origin in cors.split(",") if origin], hosts)
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(answerers)} at http://{shown}:{listening.getsockname()[1]}/  (Ctrl-C ends)", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=FAREWELL)
    uvicorn.Server(config).run(sockets=[listening])


def load(bases: list[tuple[str, str]], device: str, dtype: str) -> dict[str, Answerer]:
    """Open checkpoints, each with the adapter beside it or none; return them by their models' names."""
    answerers = {}
    for name, (folder, adapter) in zip(names([adapter or folder for folder, adapter in bases]), bases, strict=True):
        with waiting(f"loading {adapter or folder}"):
            answerers[name] = Answerer.open(folder, device, dtype, adapter)
    return answerers


def paths(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def names(folders: list[str]) -> list[str]:
    """Return each folder's model name: the folder of its run; where that is another's too, more of its path."""
    parts = []
    for folder in folders:
        whole = list(Path(folder).absolute().parts[1:])
        parts.append(whole[:-1] if len(whole) > 1 and CHECKPOINT.fullmatch(whole[-1]) else whole)
    if twice := [folder for index, folder in enumerate(folders) if parts.index(parts[index]) != index]:
        raise UserError(f"--ckpt: {twice[0]} is of a run that is named already; name each run once")
    length = [1] * len(parts)
    while True:
        found = ["/".join(one[-count:]) for one, count in zip(parts, length, strict=True)]
        clashing = [index for index, name in enumerate(found) if found.count(name) > 1]
        if not clashing:
            return found
        for index in clashing:
            length[index] += 1


def base_of(adapter: str, folders: list[str]) -> str:
    """Return the checkpoint that an adapter was trained on, or the only one."""
    if len(folders) == 1:
        return folders[0]
    file = Path(adapter) / "adapter_config.json"
    try:
        base = Path(json.loads(file.read_text(encoding="utf8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: names no base; give one --ckpt, the one it was trained on") from error
    if found := [folder for folder in folders if Path(folder).absolute() == base.absolute()]:
        return found[0]
    raise UserError(f"--lora {adapter}: was trained on {base}, which is not among --ckpt; add it")


def listen(host: str, port: int) -> socket.socket:
    """Take the address before models are loaded, so that one in use is known at once."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)  # whoever reads the printed line may connect at once
        return listening
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {reason}; choose another") from error


if __name__ == "__main__":
    command_line(lambda: call(serve, __doc__ or ""))
