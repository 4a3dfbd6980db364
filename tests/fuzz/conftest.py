"""How many cases are thrown: a few in `make test`, the same each time; thousands in `make fuzz`. They are counted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, settings

from fuzz.hostile import Thrower
from fuzz.mutations import files_of
from model import MiniDeepSeek
from text.tokenizer import Tokenizer

LEAST = 2000  # cases of a whole run of `make fuzz`
THROWER = pytest.StashKey[Thrower]()

# Explaining a failure traces every line, which takes longer than the limit of a case.
PHASES = [phase for phase in Phase if phase is not Phase.explain]
ANY_SPEED = {
    "deadline": None,
    "phases": PHASES,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("short", max_examples=10, derandomize=True, database=None, **ANY_SPEED)
settings.register_profile("long", max_examples=200, print_blob=True, **ANY_SPEED)


@pytest.fixture(scope="session")
def throw(request: pytest.FixtureRequest) -> Thrower:
    """`throw(action, *arguments)`: what a script that did this would end in; see `Thrower`."""
    return request.config.stash.setdefault(THROWER, Thrower())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if thrower := config.stash.get(THROWER, None):
        refused = f"{thrower.refused:,} of them refused in one line"
        terminalreporter.write_line(f"fuzz: {thrower.cases:,} cases, {refused}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    whole = session.config.args == ["tests/fuzz"] and session.config.getoption("--hypothesis-profile") == "long"
    thrower = session.config.stash.get(THROWER, None)
    if whole and exitstatus == 0 and (thrower is None or thrower.cases < LEAST):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> MiniDeepSeek:
    from conftest import TINY

    from LMConfig import LMConfig

    sizes = {**TINY, "vocab_size": tokenizer.vocab_size, "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    return MiniDeepSeek(LMConfig(**sizes))


@pytest.fixture(scope="session")
def checkpoint(model: MiniDeepSeek, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small checkpoint, without a training state."""
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return files_of(folder)


@pytest.fixture(scope="session")
def tools(model: MiniDeepSeek, tokenizer: Tokenizer, checkpoint: dict[str, bytes], world: Path) -> SimpleNamespace:
    return SimpleNamespace(model=model, tokenizer=tokenizer, checkpoint=checkpoint, world=world)
