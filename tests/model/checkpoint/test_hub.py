"""`python -m model.hf push`: a checkpoint on a hub, which a small server plays to huggingface_hub over HTTP."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from model import MiniDeepSeek
from model.checkpoint.folder import CARD
from model.hf import main

ROOT = Path(__file__).parents[3]
TOKEN = "hf_that_may_write"


class Hub:
    """What was pushed: `repositories` with their visibility, `files` with their content, by repository."""

    def __init__(self, url: str) -> None:
        self.url, self.asked = url, []
        self.repositories: dict[str, str] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self._stored: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, dict]:
        self.asked.append(path)
        if method == "PUT":
            self._stored[path.rpartition("/")[2]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            try:
                assert "license" in yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            except (AssertionError, IndexError, yaml.YAMLError):
                return 400, {"errors": [{"message": "front matter is not metadata"}]}
            return 200, {}
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            if given["organization"] != "anna":
                return 403, {"error": "You don't have the rights to create a model under this namespace"}
            known = name in self.repositories
            self.repositories.setdefault(name, given.get("visibility", "public"))
            return (409 if known else 200), {"url": f"{self.url}/{name}"}
        name = next((name for name in self.repositories if name in path), "")
        if not name:
            return 404, {"error": "Repository not found"}
        if path == f"/api/models/{name}":
            return 200, {"id": name, "private": self.repositories[name] == "private"}
        if path == f"/api/models/{name}/preupload/main":
            modes = {".safetensors": "lfs"}
            wanted = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [
                {"path": file, "uploadMode": modes.get(Path(file).suffix, "regular"), "shouldIgnore": False}
                for file in wanted
            ]}  # fmt: skip
        if path == f"/{name}.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.url}/lfs/{one['oid']}"}} for one in wanted]
            return 200, {"objects": [{**one, "actions": each} for one, each in zip(wanted, actions, strict=True)]}
        if path == f"/api/models/{name}/commit/main":
            return 200, self._commit(name, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"no {path}"}

    def _commit(self, name: str, operations: list[dict]) -> dict:
        for value in (operation["value"] for operation in operations if operation["key"] != "header"):
            content = base64.b64decode(value["content"]) if "content" in value else self._stored[value["oid"]]
            self.files.setdefault(name, {})[value["path"]] = content
        return {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    listening = socket.create_server(("127.0.0.1", 0))
    hub = Hub(f"http://127.0.0.1:{listening.getsockname()[1]}")

    async def answer(request) -> JSONResponse:
        token = request.headers.get("authorization", "")
        status, content = hub.answer(request.method, request.url.path, await request.body(), token)
        return JSONResponse(content, status)

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST", "PUT"])])
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield hub
    server.should_exit = True
    thread.join()


@pytest.fixture
def push(run, hub, monkeypatch, tmp_path):
    """`push(folder, name, *options)` to that hub, without a login of the machine's, and without Xet."""
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    return lambda *arguments: run(main, "push", *arguments)


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path) -> Path:
    """A checkpoint folder with training state and a hidden file."""
    folder = tmp_path / "final"
    tiny_model(vocab_size=tokenizer.vocab_size).save_pretrained(folder)
    tokenizer.save(folder)
    (folder / "training").mkdir()
    for name in ("training/state.safetensors", "training/progress.json", ".README.md.partial"):
        (folder / name).write_text("{}", encoding="utf8")
    return folder


PUSHED = {
    "config.json", "generation_config.json", "model.safetensors", "mtp.safetensors", "tokenizer.json",
    "tokenizer_config.json", CARD,
}  # fmt: skip


def test_a_folder_is_pushed_without_its_training_state_and_opens_again(hub, folder, tmp_path):
    given = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-m", "model.hf", "push", str(folder), "anna/small"]
    done = subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}: pushed to {hub.url}/anna/small\n" and "states no license" in done.stderr
    assert set(hub.files["anna/small"]) == PUSHED and hub.repositories == {"anna/small": "public"}
    (tmp_path / "arrived").mkdir()
    for name, content in hub.files["anna/small"].items():
        assert content == (folder / name).read_bytes()
        (tmp_path / "arrived" / name).write_bytes(content)
    MiniDeepSeek.from_pretrained(tmp_path / "arrived")


def test_a_private_repository_stays_private_and_a_public_one_is_not_taken_for_it(push, hub, folder):
    for _ in range(2):  # the second time it is there already
        assert push(folder, "anna/hidden", "--private", "--token", TOKEN).code == 0
    assert hub.repositories == {"anna/hidden": "private"}
    assert push(folder, "anna/open", "--token", TOKEN).code == 0
    asked = len(hub.asked)
    done = push(folder, "anna/open", "--private", "--token", TOKEN)
    assert done.code == 2 and "anna/open: is there already, and public" in done.err
    assert not [path for path in hub.asked[asked:] if "commit" in path or "preupload" in path]


def test_an_edited_card_is_pushed_as_it_is(push, hub, folder):
    (folder / CARD).write_text("---\nlicense: mit\n---\n# mine\n", encoding="utf8")
    done = push(folder, "anna/small", "--token", TOKEN)
    assert (done.code, done.err.count("license")) == (0, 0)
    assert hub.files["anna/small"][CARD] == b"---\nlicense: mit\n---\n# mine\n"


def is_refused(done, *words: str) -> bool:
    assert done.code in (2, 3) and done.err.startswith("error: ") and TOKEN not in done.err
    lines = [line for line in done.err.splitlines() if line.startswith(("error", "Traceback"))]
    return len(lines) == 1 and all(word in done.err for word in words)


def test_what_cannot_be_pushed_is_one_line(push, hub, folder, tmp_path, monkeypatch):
    assert is_refused(push(folder, "anna/small"), "no token; set HF_TOKEN")
    assert is_refused(push(folder, "anna/small", "--token", "hf_wrong"), "answered 401", "the token is not valid")
    assert is_refused(push(folder, "anna/small", "--token", "hf_\u00e4"), "letters that no token has")
    assert is_refused(push(folder, "carl/small", "--token", TOKEN), "answered 403", "may not write there")
    for name in ("small", "anna/sm all", "https://x/anna/small", "a/b/c"):
        assert is_refused(push(folder, name, "--token", TOKEN), f"{name}: give owner/name")
    assert is_refused(push(folder, "anna/a--b", "--token", TOKEN), "anna/a--b: could not be uploaded")
    (folder / CARD).write_text("---\nlicense: [\n---\n", encoding="utf8")
    assert is_refused(push(folder, "anna/small", "--token", TOKEN), "front matter is not metadata")
    assert not hub.files


@pytest.mark.parametrize("kind", ["nothing", "cut short", "an adapter"])
def test_what_is_no_checkpoint_is_not_pushed(kind, push, hub, folder, tmp_path):
    if kind == "nothing":
        shutil.rmtree(folder)
    elif kind == "cut short":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50])
    else:
        (folder / "config.json").rename(folder / "adapter_config.json")
    words = {"cut short": "damaged or cut short", "an adapter": "is an adapter"}.get(kind, "give a checkpoint folder")
    assert is_refused(push(folder, "anna/small", "--token", TOKEN), words, str(folder))
    assert hub.asked == []


def test_without_a_network_it_is_one_line(push, folder, monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    assert is_refused(push(folder, "anna/small", "--token", TOKEN), f"no connection to {url}", "check the network")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_refused(push(folder, "anna/small", "--token", TOKEN), "HF_HUB_OFFLINE is set")
