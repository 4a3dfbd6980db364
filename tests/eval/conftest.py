"""A checkpoint that answers, and a way to run a script of eval/ as its last line does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cli import call
from eval.answering import Answerer


@pytest.fixture(scope="session")
def answerer(pretrained) -> Answerer:
    return Answerer.open(str(pretrained / "final"), "cpu", "fp32")


@pytest.fixture
def script(run) -> Callable:
    """`script(function, *arguments)`: exit code and output of a script with this function."""

    def script(function: Callable[..., None], *arguments: object):
        def main() -> None:
            call(function, "")

        return run(main, *arguments)

    return script
