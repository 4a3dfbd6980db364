"""Starting the server."""

from __future__ import annotations

import threading

import uvicorn

import eval.serve
from eval.answering import Answerer
from eval.serving.worker import Worker


def test_whatever_loads_models_has_ended_when_the_server_runs(pretrained, monkeypatch, capsys):
    """Its OpenMP threads would take the worker's from the cores: 1.6 times as long for a token."""
    loaders, running = [], []

    def watched(function):
        def call(*arguments, **options):
            loaders.append(threading.current_thread())
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(Answerer, "open", watched(Answerer.open))
    monkeypatch.setattr(eval.serve, "Worker", watched(Worker))
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: running.extend(one.is_alive() for one in loaders))
    eval.serve.serve(str(pretrained / "final"), port=0, device="cpu")
    assert running == [False, False]
    assert capsys.readouterr().out.startswith(f"serving {pretrained.name} at http://127.0.0.1:")
