"""A teacher behind an endpoint that misbehaves: who waits, who asks again, what is kept; nobody is asked twice."""

from __future__ import annotations

import email.utils
import json
import os
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import call_main
from forked import Forked

import distill
import training.distill.answers
import training.distill.endpoint
from errors import UserError
from text.chats.conversations import read_conversations
from training.distill.answers import Answer, Ask, Failure, Journal, ask_all
from training.distill.endpoint import LONGEST_WAIT, Endpoint, seconds_to_wait


class Server(ThreadingHTTPServer):
    """Speaks OpenAI's chat completions. `moods`: how each question's attempts are answered, the last one for ever.

    A mood is a status, (status, Retry-After), the body of a 200, changes of a good reply's message and finish_reason,
    "silence", "hang up" or "well".
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.moods: dict[str, list[object]] = {}
        self.usual: Callable[[str], str] = lambda question: f"the answer to {question}"
        self.asked: list[tuple[str, dict, dict]] = []  # question, body, headers
        self.lock, self.running, self.most_running = threading.Lock(), 0, 0
        self.delay, self.quiet = 0.0, threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def questions(self) -> list[str]:
        return [question for question, *_ in self.asked]


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        question = body["messages"][-1]["content"]
        with server.lock:
            attempt = server.questions().count(question)
            server.asked.append((question, body, dict(self.headers)))
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        time.sleep(server.delay)
        moods = server.moods.get(question, ["well"])
        is_ours = urlsplit(self.path).path == "/v1/chat/completions"  # whole addresses come to a proxy
        self.answer(question, moods[min(attempt, len(moods) - 1)] if is_ours else 404)
        with server.lock:
            server.running -= 1

    def answer(self, question: str, mood: object) -> None:
        if mood == "hang up":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)  # close() alone waits for who holds it too
        if mood == "silence":
            self.server.quiet.wait(30)
        status, wait = mood if isinstance(mood, tuple) else (mood, "") if isinstance(mood, int) else (200, "")
        change = mood if isinstance(mood, dict) else {}
        message = {"role": "assistant", "content": self.server.usual(question), **change.get("message", {})}
        content: object = {"error": {"message": f"this is {status}"}}
        if status == 200:
            usage = {"completion_tokens": len(str(message["content"]).split())}
            content = {"choices": [{"message": message, "finish_reason": change.get("finish", "stop")}], "usage": usage}
        data = mood if isinstance(mood, bytes) else json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in {"Retry-After": wait, "Content-Length": str(len(data))}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # who asked has given up
            self.close_connection = True


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with serving(server):
        yield server
        server.quiet.set()


@pytest.fixture(autouse=True)
def no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def endpoint(server: Server, **changes: object) -> Endpoint:
    return Endpoint(**{"url": server.url, "model": "m", "first_pause": 0.02, "timeout": 30.0, **changes})


def asks(*questions: str) -> list[Ask]:
    return [Ask.of([{"role": "user", "content": question}], 0) for question in questions]


def replies(teacher: Endpoint, *questions: str) -> dict[str, Answer | Failure]:
    return {ask.messages[0]["content"]: answer for ask, answer in teacher.answers(asks(*questions))}


def noted() -> tuple[list[float], Callable]:
    """A list of pauses, and a sleep that writes them down instead of sleeping."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    return pauses, sleep


def test_answers_come_with_their_end_and_length(server):
    server.moods = {"thinks": [{"message": {"reasoning_content": " so \n"}}], "cut": [{"finish": "length"}]}
    got = replies(endpoint(server, key="secret", temperature=0.5, max_new_tokens=7), "plain", "thinks", "cut")
    assert got["plain"] == Answer("the answer to plain", "stop", 4) and got["cut"].finish == "length"
    assert got["thinks"].text == "<think>\nso\n</think>\n\nthe answer to thinks"
    _, body, headers = server.asked[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 7)
    assert headers["Authorization"] == "Bearer secret"


CUT_OFF, NO_CHOICE = b'{"choices": [{"mess', b'{"choices": []}'


@pytest.mark.parametrize("mood", [429, 500, (503, "odd"), "silence", "hang up", CUT_OFF, NO_CHOICE], ids=str)
def test_a_transient_fault_is_asked_again(mood, server):
    server.moods["q"] = [mood, mood, "well"]
    got = replies(endpoint(server, timeout=0.5 if mood == "silence" else 30.0), "q")
    assert got == {"q": Answer("the answer to q", "stop", 4)} and server.questions() == ["q", "q", "q"]


def test_a_question_is_given_up_after_its_attempts_and_the_others_go_on(server):
    server.moods = {"bad": [500], "long": [400], "odd": [NO_CHOICE]}
    got = replies(endpoint(server, attempts=3), "bad", "good", "long", "odd")
    assert got["bad"] == Failure("status 500 (this is 500), 3 attempts") and isinstance(got["good"], Answer)
    assert got["odd"] == Failure('status 200 with no answer ({"choices": []}), 3 attempts')
    assert got["long"] == Failure("status 400 (this is 400)")
    assert Counter(server.questions()) == {"bad": 3, "odd": 3, "good": 1, "long": 1}


def test_a_person_reads_of_each_further_attempt_once_however_many_questions_wait(server, capsys):
    server.moods = {name: [500, 500, "well"] for name in ("q", "r", "s")}
    assert len(replies(endpoint(server), "q", "r", "s")) == 3
    first, second = capsys.readouterr().err.splitlines()
    assert f"notice: --teacher {server.url}: status 500" in first and "attempt 2 of " in first
    assert "attempt 3 of " in second


def test_pauses_grow_and_are_not_the_same_for_all(server):
    server.moods["q"] = [500, 500, 500, "well"]
    pauses, sleep = noted()
    for _ in range(2):
        server.asked.clear()
        replies(endpoint(server, first_pause=1.0, sleep=sleep), "q")
    assert all(2**n / 2 <= pause <= 2**n for n, pause in enumerate(pauses[:3])) and len(set(pauses)) == 6


def test_a_server_that_names_the_wait_is_obeyed(server):
    server.moods["q"] = [(429, email.utils.formatdate(time.time() + 4, usegmt=True)), (429, "3"), "well"]
    pauses, sleep = noted()
    replies(endpoint(server, sleep=sleep), "q")
    assert len(pauses) == 2 and 2 < pauses[0] <= 4 and pauses[1] == 3


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, 0), ("", 0), ("7", 7), ("-3", 0), ("soon", 0), ("nan", 0), ("99999", LONGEST_WAIT)],
)
def test_what_a_header_says(header, seconds):
    assert seconds_to_wait(header) == seconds


@pytest.mark.parametrize("mood", [401, 403, 404, b'{"error": {"message": "this is 401", "code": 401}}'], ids=str)
def test_a_server_that_wants_nobody_is_one_line(mood, server):
    server.moods["q"] = [mood]
    with pytest.raises(UserError, match=rf"--teacher {server.url}: status .*this is 40\d\); (set|check)") as caught:
        replies(endpoint(server), "q")
    assert "\n" not in str(caught.value)


def test_no_more_questions_at_a_time_than_allowed(server):
    server.delay = 0.03
    replies(endpoint(server, concurrency=3), *(f"q{n}" for n in range(15)))
    assert server.most_running == 3 and len(server.asked) == 15


def test_a_teacher_that_is_gone_is_given_up_and_its_answers_are_kept(server, tmp_path):
    server.moods = {f"q{n}": [500] for n in range(5, 60)}
    teacher = endpoint(server, attempts=1, concurrency=1)
    with pytest.raises(UserError, match=r"25 questions in a row .* status 500 .*keeps 5 answers, --resume"):
        ask_all(teacher, asks(*(f"q{n}" for n in range(60))), Journal(tmp_path / "a.jsonl"))
    assert len(server.asked) <= 32 and len(Journal(tmp_path / "a.jsonl").known) == 5


def test_who_stops_does_not_wait_for_the_others(server, tmp_path):
    """A disk that fails, or Ctrl-C: questions on their way are left alone."""
    server.moods["slow"], server.delay = ["silence"], 0.5  # in which both are asked

    class FullDisk(Journal):
        def add(self, ask: Ask, answer: Answer) -> None:
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        ask_all(endpoint(server, timeout=60.0), asks("slow", "fast"), FullDisk(tmp_path / "a.jsonl"))
    assert not server.quiet.is_set() and "slow" in server.questions()


# Proxies


@pytest.mark.parametrize("name", ["HTTP_PROXY", "all_proxy"])
def test_a_proxy_of_the_environment_is_used(name, server, monkeypatch):
    monkeypatch.setenv(name, server.url.removesuffix("/v1"))
    got = replies(endpoint(server, url="http://teacher.invalid/v1"), "q")
    assert got["q"].text == "the answer to q" and server.asked[0][2]["Host"] == "teacher.invalid"


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_a_socks_proxy_is_greeted_and_what_is_none_counts_as_a_broken_connection(scheme, server, monkeypatch):
    heard = []

    class Garbage(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            heard.append(self.request.recv(3))
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Garbage) as other, serving(other):
        monkeypatch.setenv("ALL_PROXY", f"{scheme}://127.0.0.1:{other.server_address[1]}")
        got = replies(endpoint(server, attempts=2), "q")
    assert "Malformed reply, 2 attempts" in got["q"].reason
    assert heard == [b"\5\1\0"] * 2  # version 5, one way to log in: none (RFC 1928)


@pytest.mark.parametrize("addresses", ["::1", "[::1]:1", "fe80::/10, ::1"])
def test_no_proxy_may_hold_ipv6_addresses(addresses, server, monkeypatch):
    """Whether this machine speaks IPv6 or not: what is told apart is who was asked."""
    monkeypatch.setenv("ALL_PROXY", server.url.removesuffix("/v1"))
    teacher = endpoint(server, url="http://[::1]:1/v1", attempts=1)
    assert replies(teacher, "through the proxy")["through the proxy"].text
    monkeypatch.setenv("NO_PROXY", addresses)
    assert "ConnectError" in replies(teacher, "past it")["past it"].reason
    assert server.questions() == ["through the proxy"]


@pytest.mark.parametrize("value", ["socks://127.0.0.1:1080", "http://[::1", "127.0.0.1:port"])
def test_a_malformed_proxy_is_one_line(value, server, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", value)
    with pytest.raises(UserError, match=r"ALL_PROXY: no address of a proxy .*socks5://host:port"):
        replies(endpoint(server), "q")


# The journal


def test_what_was_answered_is_not_asked_again_and_a_torn_last_line_is(server, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    ask_all(endpoint(server, concurrency=1), asks("a", "b"), Journal(path))
    path.write_bytes(path.read_bytes()[:-9])
    ask_all(endpoint(server, concurrency=1), asks("a", "b", "c"), Journal(path))
    assert server.questions() == ["a", "b", "b", "c"]
    assert "3 questions: 1 answered before, 2 now" in capsys.readouterr().out
    assert [answer.text for answer in Journal(path).known.values()] == [f"the answer to {q}" for q in "abc"]


def test_a_broken_line_elsewhere_is_named_and_odd_characters_survive(server, tmp_path):
    path, text = tmp_path / "a.jsonl", "\ud83d half a pair \u2028 and 中文"
    server.usual = lambda question: text
    ask_all(endpoint(server), asks("a"), Journal(path))
    assert [answer.text for answer in Journal(path).known.values()] == [text]
    path.write_text('{"key": "x"}\n{"key": "y", "answer": "", "finish": "stop", "tokens": 0}\n', encoding="utf8")
    with pytest.raises(UserError, match=r"a.jsonl:1: not an answer"):
        Journal(path)


# The command


def prompts(folder: Path, *questions: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions), encoding="utf8")
    return path


def command(server: Server, data: Path, out: Path, *more: object) -> list[object]:
    return ["--method", "answers", "--teacher", server.url, "--teacher_model", "m", "--data", data, "--out", out, *more]


def test_prompts_become_a_file_to_fine_tune_on(server, tmp_path, run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from the environment")
    server.moods = {
        "cut": [{"finish": "length"}],
        "filtered": [{"finish": "content_filter"}],
        "nothing": [{"message": {"content": None}}],
        "refused": [{"message": {"content": "I'm sorry, but I can't help with that."}}],
        "thinking": [{"message": {"content": "<think>on and on"}}],
        "parrot": [{"message": {"content": "yes it is so " * 30}}],
        "tidy": [{"message": {"content": "\r\n  one \r\n\r\n\r\n\r\ntwo\t\n"}}],
    }
    data = prompts(tmp_path, "good", *server.moods, "good")
    done = run(distill.main, *command(server, data, tmp_path / "out"))
    assert done.code == 0, done.err
    chats = {c[0]["content"]: c[1]["content"] for c in read_conversations(tmp_path / "out" / "sft.jsonl")}
    assert chats == {"good": "the answer to good", "tidy": "one\n\ntwo"}
    for line in (
        "8 questions: 0 answered before, 8 now",
        "8 answers to 8 prompts: 2 kept, 2 of them unverified, 6 dropped; 6 prompts without an answer",
        "1 x cut at the limit", "2 x refusal", "1 x empty", "1 x broken think part", "1 x repeats itself",
    ):  # fmt: skip
        assert line in done.out
    assert server.asked[0][2]["Authorization"] == "Bearer from the environment"
    again = run(distill.main, *command(server, data, tmp_path / "out"))
    assert again.code == 2 and "holds answers already; add --resume" in again.err
    again = run(distill.main, *command(server, data, tmp_path / "out", "--resume"))
    assert again.code == 0 and "8 answered before, 0 now" in again.out and len(server.asked) == 8
    for change in (["--sample_temperature", 0.3], ["--teacher_model", "n"], ["--max_new_tokens", 9]):
        again = run(distill.main, *command(server, data, tmp_path / "out", "--resume", *change))
        assert "0 answered before, 8 now" in again.out, (change, again.err)


@pytest.mark.parametrize(("key", "sent"), [("secret\n", "Bearer secret"), ("", None), ("sécret", 0)])
def test_a_key_is_sent_or_refused_in_one_line(key, sent, server, tmp_path, run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    done = run(distill.main, *command(server, prompts(tmp_path, "a"), tmp_path / "out"))
    if sent != 0:
        assert done.code == 0 and server.asked[0][2].get("Authorization") == sent
    else:
        assert done.code == 2 and "OPENAI_API_KEY: has a character" in done.err and done.err.count("\n") == 1


def test_a_teacher_that_answers_nothing_ends_the_run_in_its_own_words(server, tmp_path, run):
    server.moods = {"a": [400], "b": [400]}
    done = run(distill.main, *command(server, prompts(tmp_path, "a", "b"), tmp_path / "out"))
    assert done.code == 2 and done.err.count("\n") == 1
    assert "not one of 2 questions has an answer, mostly status 400 (this is 400); remove the cause" in done.err
    server.moods.clear()
    assert run(distill.main, *command(server, prompts(tmp_path, "a", "b"), tmp_path / "out")).code == 0


def test_answers_to_problems_are_verified(server, tmp_path, run):
    path = tmp_path / "problems.jsonl"
    rows = [{"question": f"{n} and {n}?", "answer": str(2 * n)} for n in range(1, 5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    server.usual = lambda question: f"that is {2 * int(question.split()[0])}"
    server.moods["3 and 3?"] = [{"message": {"content": "that is 7"}}]
    done = run(distill.main, *command(server, path, tmp_path / "out", "--samples", 3, "--keep_answers", 2))
    assert done.code == 0, done.err
    assert "3 x wrong" in done.out and "6 x duplicate" in done.out and "3 kept, 9 dropped" in done.out
    assert "unverified" not in done.out and len(server.asked) == 12


def test_a_killed_run_goes_on_where_it_was(server, tmp_path, run):
    """kill -9 between answers: at most those in flight are asked again."""
    server.delay = 0.05
    data = prompts(tmp_path, *(f"question {n}" for n in range(40)))
    arguments = command(server, data, tmp_path / "out", "--concurrency", 2)
    killed = Forked(lambda: call_main(distill.main, *arguments), tmp_path / "said.log")
    end = time.monotonic() + 60
    while len(server.asked) < 10 and time.monotonic() < end:
        time.sleep(0.01)
    assert killed.kill()
    before = len(Journal(tmp_path / "out" / "answers.jsonl").known)
    assert 4 <= before < 40
    server.delay = 0.0
    done = run(distill.main, *arguments, "--resume")
    assert done.code == 0, done.err
    assert f"{before} answered before, {40 - before} now" in done.out
    assert set(server.questions()) == {f"question {n}" for n in range(40)} and len(server.asked) <= 42
    assert len(list(read_conversations(tmp_path / "out" / "sft.jsonl"))) == 40


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--teacher_model", ""], "give the name that it serves the model under, --teacher_model NAME"),
        (["--method", "logits"], "an endpoint tells no distributions; pass --method answers"),
        (["--method", "words"], "--method words: one of logits, answers"),
        (["--student", "{preset: demo}"], "is not a checkpoint of this project; give --ckpt instead"),
        (["--samples", 0], "--samples 0: must be at least 1"),
        (["--timeout", 0], "--timeout 0: must be at least 0 and above 0"),
        (["--most_repeated", 2], "--most_repeated 2: a share"),
        (["--min_chars", 9, "--max_chars", 3], "--min_chars 9, --max_chars 3"),
        (["--rewards", "{correkt: 1}"], "reward 'correkt': not one of"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--teacher", "http://[::/v1"], "no address"),
        (["--teacher", "http://127.0.0.1:65536/v1"], "no address ("),
        (["--teacher", "http://127.0.0.1:1/v1"], "questions in a row without an answer"),
    ],
)
def test_what_makes_no_sense_is_one_line(options, what, server, tmp_path, run, monkeypatch):
    monkeypatch.setattr(training.distill.answers, "MOST_FAILURES", 1)
    monkeypatch.setattr(training.distill.endpoint, "Endpoint", partial(Endpoint, attempts=1))
    data = prompts(tmp_path, "a", "b")
    done = run(distill.main, *command(server, data, tmp_path / "out", *options))
    assert done.code == 2 and what in done.err, done.err
    assert done.err.count("\n") == 1
