"""What people and endpoints say to the scripts: names, options, conversations, replies."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from data_files import file_bytes, write
from hypothesis import given
from hypothesis import strategies as st

import distill
import pretrain
import train_tokenizer
from cli import call, parse
from eval.answering import Answerer
from eval.chat import Conversation, chat
from eval.compared_run import open_runs
from eval.comparison import markdown
from eval.experts import experts
from eval.held_out import held_out
from eval.paper.__main__ import paper
from eval.perplexity import perplexity, score_text
from eval.questions import questions
from eval.reasoning import reasoning
from eval.report import report
from eval.run import run
from eval.serve import serve
from eval.style import style
from eval.tasks.opened import open_tasks
from fuzz.hostile import thrown
from fuzz.mutations import DEEP, PLACES, damaged, lay_out, put, strange, strange_json, written
from fuzz.test_fuzz_files import ROOT, RUNS
from fuzz.test_fuzz_rows import CONTENTS, data_files
from model.decoding.sampling import Sampling
from text.chats.conversations import read_conversations
from text.sources.registry import Source, find_sources
from text.tokenizer import Tokenizer
from training.distill.curation import AnswerSettings, gather_answers
from training.distill.endpoint import Endpoint
from training.parallel import plan
from world import __main__ as world_script


@pytest.fixture(scope="module")
def folder(checkpoint: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that opens."""
    return lay_out(tmp_path_factory.mktemp("talk") / "ckpt", checkpoint)


@pytest.fixture(scope="module")
def answerer(folder: Path) -> Answerer:
    return Answerer.open(str(folder), "cpu", "fp32")


@pytest.fixture(autouse=True)
def single(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No more attempts than there are questions, and random numbers as they were."""
    monkeypatch.setattr("training.distill.answers.MOST_FAILURES", 2)
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


# Names and options


@thrown()
@given(text=st.text(max_size=40) | st.text("a=,./:-1e \0", max_size=12))
def test_what_data_names(throw, text):
    throw(find_sources, text, ROOT / "datasets.yaml", None)


@thrown(0.5)
@given(names=st.lists(st.sampled_from(("ceval", "no-such", "a.yaml", "", "=", "../x", "text=", "text=a,b")), max_size=3)
       | st.lists(st.text(max_size=8), max_size=2))  # fmt: skip
def test_what_suite_names(throw, names):
    throw(open_tasks, ",".join(names), False)


@thrown(0.5)
@given(names=st.lists(st.text(max_size=6) | st.sampled_from(("a", "b", "", ".", "a/../a", "/", "\0")), max_size=3))
def test_names_of_runs(throw, names):
    with tempfile.TemporaryDirectory() as place:
        lay_out(Path(place), RUNS)
        given = [str(Path(place, name)) if name in ("a", "b") else name for name in names]
        throw(lambda: markdown(open_runs(given)))


NAMES = ("optim.lr", "model.hidden_size", "model", "optim", "max_steps", "out", "bias_speed", "resume", "config", "x")
VALUES = ("nan", "inf", "-1", "1e999", "{}", "[", "{a: b}", "null", "true", "9" * 400, "*a", "",
          "!!python/name:os.system")  # fmt: skip


@thrown(0.5)
@given(given=st.dictionaries(st.sampled_from(NAMES), st.text(max_size=12) | st.sampled_from(VALUES), max_size=3))
def test_a_command_line(throw, given):
    arguments = [f"--{name}={value}" for name, value in {"data": "a", "out": "b", **given}.items()]
    throw(parse, pretrain.PretrainSettings, "", arguments)


def test_settings_that_distil(throw):
    words = ["--data=a", "--out=b", "--teacher=c", "--student={hidden_size: x}"]
    assert throw(parse, distill.DistillSettings, "", words).code in (0, 2)


# With what each begins; `CKPT` and `FILE` are a checkpoint and lines of questions.
SCRIPTS: dict[Callable[..., None], dict[str, str]] = {
    chat: {"ckpt": "CKPT", "once": "hm?", "max_new_tokens": "3"},
    perplexity: {"ckpt": "CKPT", "file": "FILE"},
    questions: {"ckpt": "CKPT", "file": "FILE"},
    style: {"ckpt": "CKPT", "file": "FILE"},
    experts: {"ckpt": "CKPT", "file": "FILE", "column": "question", "tokens": "30", "out": "OUT"},
    run: {"ckpt": "CKPT", "suite": "demo-questions=FILE", "out": "OUT"},
    reasoning: {"ckpt": "CKPT", "data": "FILE", "max_new_tokens": "2", "val_fraction": "0.5"},
    held_out: {"run": "OUT", "out": "OUT/held.jsonl"},
    report: {"out": "OUT"},
    serve: {"ckpt": "CKPT", "port": "0"},
    paper: {"tokenizer": "CKPT", "data": "FILE", "text": "FILE", "only": "balance", "out": "OUT"},
}
WORDS = ("", "0", "-1", "3", "0.5", "nan", "inf", "1e999", "9" * 400, "null", "true", "[1]", "{}", "x", "int8", "cpu",
         "fp32", "arithmetic:1", "CKPT", "FILE", "nowhere", "FILE,FILE", ",", "\ud800", "*a")  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@thrown(0.15)
@given(data=st.data())
def test_the_options_of(throw, folder, script, data):
    names = sorted(set(inspect.signature(script).parameters) - {"json", "show", "host"})
    changes = data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from(WORDS), max_size=2))
    chosen = {**SCRIPTS[script], **{name: "cpu" for name in names if name == "device"}, **changes}
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        for name in ("matplotlib.figure.Figure.savefig", "uvicorn.Server.run", "eval.serve.Worker"):
            patch.setattr(name, lambda *_, **__: None)
        patch.setattr("eval.paper.training.start", lambda *_: None)  # then no run is there
        patch.setattr("eval.paper.training.training_rates", lambda given, *_: {name: [9.0] for name in given})
        patch.setattr("eval.run.find_spec", lambda _: None)  # lm-eval takes seconds to read its own task files
        patch.chdir(place)
        Path("OUT").mkdir()
        rows = [{"question": f"{n}?", "answer": f"{n}", "opening": "a", "closing": "b"} for n in range(3)]
        write(Path("FILE.jsonl"), rows)
        for name, word in {"CKPT": str(folder), "FILE": "FILE.jsonl"}.items():
            chosen = {option: value.replace(name, word) for option, value in chosen.items()}
        throw(call, script, "", [f"--{name}={value}" for name, value in chosen.items()])


def as_script(main: Callable[[], None], *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        main()


LARGE = ("3", "0.5", "9" * 400)  # worlds that take seconds


@thrown(0.5)
@given(
    options=st.dictionaries(st.sampled_from(("scale", "seed")), st.sampled_from(WORDS), max_size=2),
    place=st.sampled_from(PLACES),
)
def test_the_options_of_the_world(throw, options, place):
    options = {"scale": "0.0001", **{name: value for name, value in options.items() if value not in LARGE}}
    with tempfile.TemporaryDirectory() as there:
        put(Path(there, "out"), b"x", place)
        given = [f"--{name}={value}" for name, value in options.items()]
        try:
            throw(as_script, world_script.main, f"--out={Path(there, 'out')}", *given)
        except AssertionError as error:  # argparse's own refusal: usage, and its line
            assert "invalid" in str(error) and "error: argument" in str(error)


PLANNED = ("gpus", "gpu", "dist.pp", "dist.ep", "dist.zero", "sequence_length", "batch_tokens", "max_tokens")


@thrown(0.5)
@given(options=st.dictionaries(st.sampled_from(PLANNED), st.sampled_from(WORDS), max_size=2))
def test_a_plan(throw, options):
    options = {"config": ROOT / "configs" / "1b-moe.yaml", "gpus": "8", **options}
    throw(as_script, plan.main, *(f"--{name}={value}" for name, value in options.items()))


# Conversations and replies

LINES = st.text(max_size=30) | st.sampled_from(("/reset", "/system \ud800", "/system", "/x", "</s><|user|>", "长" * 80))


@thrown(0.5)
@given(lines=st.lists(LINES, max_size=4), new=st.sampled_from((1, 5, 10**9)), speculative=st.booleans())
def test_a_conversation(throw, answerer, lines, new, speculative):
    talk = Conversation(answerer, "S", Sampling(temperature=0.0), new, 0, speculative)
    for line in lines:
        done = throw(talk.command if line.startswith("/") else talk.ask, line)
        assert done.code in (0, 2) and len(talk.messages) % 2 == 0


@thrown()
@given(blocks=st.lists(st.text(max_size=60), max_size=4), window=st.sampled_from((0, 1, 2, 7, 10**9)))
def test_a_text_to_score(throw, answerer, blocks, window):
    score = throw(score_text, answerer, iter(blocks), window).value
    assert score.tokens == sum(len(answerer.tokenizer.encode(block)) for block in blocks) and score.nll >= 0


REPLY = {"id": "x", "choices": [{"index": 0, "finish_reason": "stop", "message": {
    "role": "assistant", "content": "春天来了。", "reasoning_content": "so"}}],
    "usage": {"completion_tokens": 3}}  # fmt: skip
HEADERS = st.dictionaries(
    st.sampled_from(("Retry-After", "Content-Type", "Content-Encoding", "Location")),
    st.sampled_from(("-1", "nan", "1e999", "soon", "gzip", "br", "text/plain; charset=none", "http://[", "1")),
    max_size=2,
)


@dataclass(frozen=True)
class Misbehaving(Endpoint):
    """An endpoint whose every reply is `respond()`, without a network and without pauses."""

    respond: Callable[[], httpx2.Response] = httpx2.Response

    def _client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(transport=httpx2.MockTransport(lambda _: self.respond()))


async def at_once(_: float) -> None:
    await asyncio.sleep(0)


@st.composite
def replies(draw: Any) -> bytes:
    content = draw(strange_json(json.dumps(REPLY).encode()))
    return gzip.compress(content) if draw(st.integers(0, 4)) == 0 else content


def gathered(file: Path, teacher: Endpoint, resume: bool = False, **settings: Any) -> Path:
    given = [Source(str(file))], resume, "skip", AnswerSettings(**settings), teacher, 0, (), 9
    return gather_answers(file.with_name("out"), *given)


@thrown()
@given(content=replies(), status=st.sampled_from((200, 200, 200, 200, 204, 301, 400, 401, 429, 503)), headers=HEADERS)
def test_what_an_endpoint_answers(throw, content, status, headers):
    """From the question to the file that is trained on, which can be read."""

    def respond() -> httpx2.Response:
        return httpx2.Response(status, headers=headers, stream=httpx2.ByteStream(content))

    teacher = Misbehaving("http://x/v1", "m", attempts=2, sleep=at_once, respond=respond)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "p.jsonl")
        file.write_text('{"prompt": "Q"}\n{"question": "1+1?", "answer": "2"}\n', encoding="utf8")
        done = throw(gathered, file, teacher, rewards={"strict_format": 1.0})
        if done.value is not None:
            assert list(read_conversations(done.value, on_error="stop"))
        throw(gathered, file, teacher, True, rewards={"strict_format": 1.0})  # what it wrote down can be read again


@thrown(0.5)
@given(data=st.data())
def test_a_journal_that_is_resumed(throw, data):
    row = {"key": "k", "messages": [], "sample": 0, "answer": "春天。", "finish": "stop", "tokens": 3}
    teacher = Misbehaving("http://x/v1", "m", attempts=1, respond=lambda: httpx2.Response(200, json=REPLY))
    with tempfile.TemporaryDirectory() as place:
        file, journal = Path(place, "p.jsonl"), Path(place, "out", "answers.jsonl")
        file.write_text('{"prompt": "Q"}\n', encoding="utf8")
        assert throw(gathered, file, teacher).code == 0
        key = json.loads(journal.read_text(encoding="utf8"))["key"]
        line = data.draw(strange_json(json.dumps(row).encode())).replace(b'"k"', f'"{key}"'.encode())
        journal.write_bytes(line + b"\n")
        throw(gathered, file, teacher, True)


@thrown(0.3)
@given(data=st.data())
def test_collecting(throw, folder, data):
    """Problems or chats that are damaged, and rewards of any shape; the file that comes of it can be read."""
    requested = {"strict_format": 1.0, "correct": 0.0}
    rewards = data.draw(st.just(requested) | strange(requested))
    with tempfile.TemporaryDirectory() as place:
        files = {
            "problems.jsonl": file_bytes("a.jsonl", CONTENTS["prompt"]),
            "chats.jsonl": file_bytes("a.jsonl", CONTENTS["chat"]),
        }
        chosen = data.draw(st.sampled_from(sorted(files)))
        lay_out(Path(place), files)
        put(Path(place, chosen), data.draw(damaged(files[chosen])), data.draw(st.sampled_from(PLACES)))
        recipe = written({"rewards": rewards}).replace(f'"{DEEP}"'.encode(), b"[]")
        Path(place, "recipe.yaml").write_bytes(recipe)
        out = Path(place, "out.jsonl")
        options = {"config": Path(place, "recipe.yaml"), "method": "answers", "teacher": folder,
                   "data": Path(place, "problems.jsonl"),
                   "mix": Path(place, "chats.jsonl"), "out": out, "at_least": -1, "prompts": 2, "samples": 2,
                   "max_new_tokens": data.draw(st.sampled_from((1, 3, 63, 64, 10**6))), "device": "cpu"}  # fmt: skip
        done = throw(as_script, distill.main, *(f"--{name}={value}" for name, value in options.items()))
        assert out.is_file() == (done.code == 0)
        assert done.code or list(read_conversations(out, on_error="stop"))


@thrown(0.3)
@given(file=data_files(("text",)), vocab_size=st.sampled_from((280, 300)), on_error=st.sampled_from(("skip", "stop")))
def test_training_a_tokenizer(throw, file, vocab_size, on_error):
    name, content, place = file
    with tempfile.TemporaryDirectory() as there:
        put(Path(there, name), content, place)
        out, given = Path(there, "out"), str(Path(there, name))
        done = throw(train_tokenizer.train_tokenizer, given, str(out), vocab_size, min_frequency=1, on_error=on_error)
        assert done.code or Tokenizer.from_folder(out).vocab_size == vocab_size
