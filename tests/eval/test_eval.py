"""Evaluation counts every token once, compares to the letter, and the chat obeys its commands."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval.perplexity
from cli import call
from errors import UserError
from eval.answering import Answerer
from eval.chat import chat
from eval.likelihood import CacheScorer
from eval.perplexity import perplexity, read_blocks, score_text
from eval.questions import Question, Result, accuracy, questions, read_questions
from eval.report import report
from eval.style import PoliteRequest, in_style, read_polite_requests, score_style, style
from model.decoding.sampling import Sampling
from model.experts import Experts
from model.quantized import Int8Weight, QuantizedLinear


@pytest.fixture(scope="module")
def answerer(pretrained) -> Answerer:
    return Answerer.open(str(pretrained / "final"), "cpu", "fp32")


def script(function):
    """A script's main, as its last line calls it."""

    def main() -> None:
        call(function, "")

    return main


# Perplexity


def test_a_short_text_has_the_loss_of_one_pass(answerer, world):
    text = (world / "heldout.txt").read_text(encoding="utf8")[:300]
    ids = answerer.tokenizer.encode(text)
    line = torch.tensor([[answerer.tokenizer.eos_id, *ids]])
    with torch.no_grad():
        logits = answerer.model(line[:, :-1]).logits[0]
    nats = torch.nn.functional.cross_entropy(logits, line[0, 1:], reduction="sum").item()
    score = score_text(answerer, iter([text]))
    assert score.nll == pytest.approx(nats, rel=1e-5)
    assert (score.tokens, score.bytes) == (len(ids), len(text.encode()))
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / len(ids)), rel=1e-4)


@pytest.mark.parametrize("window", [16, 64, 200])
def test_a_long_text_has_the_loss_of_its_windows(window, answerer, world):
    """Each token scored by hand in the last window that scores it: half a window of context or more."""
    text = (world / "heldout.txt").read_text(encoding="utf8")[:700]
    line = [answerer.tokenizer.eos_id, *answerer.tokenizer.encode(text)]
    assert len(line) > 2 * window
    nats, start, done = 0.0, 0, 1
    while done < len(line):
        piece = torch.tensor([line[start : start + window + 1]])
        with torch.no_grad():
            logits = answerer.model(piece[:, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="none")
        nats += losses[done - start - 1 :].sum().item()
        done = start + piece.shape[1]
        start = done - 1 - window // 2
    score = score_text(answerer, iter([text[:333], text[333:]]), window, batch=3)
    assert score.tokens == len(line) - 1 and score.nll == pytest.approx(nats, rel=1e-4)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=6), st.integers(2, 20), st.integers(1, 5))
def test_every_token_is_scored_once_with_half_a_window_before_it(sizes, window, batch):
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    blocks = ["".join(chr(1000 + n) for n in range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    tokenizer = SimpleNamespace(eos_id=2, encode=lambda text: [ord(letter) for letter in text])
    reader = SimpleNamespace(
        tokenizer=tokenizer, model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=1024))
    )
    scored: list[int] = []

    def score(_: object, rows: list[tuple[list[int], list[int]]]) -> list[float]:
        assert len(rows) <= batch
        for context, ids in rows:
            assert len(context) + len(ids) <= window + 1
            for place, token in enumerate(ids, start=len(context)):
                known = token - 1000 + 1  # the end of the document before, and all letters before this one
                assert place >= min(known, window // 2)
            scored.extend(ids)
        return [0.0] * len(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheScorer, "score_windows", score)
        result = score_text(reader, iter(blocks), window, batch)
    assert scored == [ord(letter) for letter in "".join(blocks)]
    assert (result.tokens, result.bytes) == (len(scored), len("".join(blocks).encode()))


def test_a_file_is_read_in_blocks_that_lose_nothing(tmp_path, monkeypatch):
    text = "一行\r\n\n second line\u2028 with a separator\n" * 20 + "最后一行🙂"
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    for size in (1, 7, 10_000):
        monkeypatch.setattr(eval.perplexity, "BLOCK", size)
        blocks = list(read_blocks(tmp_path / "text.txt"))
        assert "".join(blocks) == text and all(block.endswith("\n") for block in blocks[:-1])


def test_perplexity_prints_one_json_object(pretrained, world, run):
    done = run(script(perplexity), "--ckpt", pretrained / "final", "--file", world / "heldout.txt", "--json")
    score = json.loads(done.out)
    assert done.code == 0 and set(score) == {"nll", "tokens", "bytes", "bits_per_byte", "perplexity"}
    assert score["bytes"] == (world / "heldout.txt").stat().st_size
    assert score["bits_per_byte"] == pytest.approx(score["nll"] / math.log(2) / score["bytes"])
    done = run(script(perplexity), "--ckpt", pretrained / "final", "--file", world / "heldout.txt")
    assert f"{score['bits_per_byte']:.4f} bits per byte" in done.out


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty; give a file with text"),
        (b"\xef\xbb\xbf", "empty; give a file with text"),
        ("月牙镇".encode("gbk"), "not UTF-8 .*iconv -f GB18030 -t UTF-8"),
        ("月牙镇".encode()[:-1], "not UTF-8"),
        (None, "no such file; give a text file"),
    ],
    ids=["empty", "only a mark", "GBK", "cut short", "missing"],
)
def test_a_text_that_cannot_be_scored_is_one_line(content, what, pretrained, tmp_path, run):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    done = run(script(perplexity), "--ckpt", pretrained / "final", "--file", path)
    assert done.code == 2 and done.out == ""
    assert re.fullmatch(rf"error: {path}: {what}.*\n", done.err)


# Questions


def test_accuracy_is_exact_answers_by_kind():
    asked = [Question("1+1", "2", "sum"), Question("2+2", "4", "sum"), Question("色?", "红", "fact")]
    results = [Result(asked[0], " 2\n"), Result(asked[1], "4."), Result(asked[2], "红")]
    assert [result.correct for result in results] == [True, False, True]
    assert accuracy(results) == {"sum": 0.5, "fact": 1.0, "all": pytest.approx(2 / 3)}


def write_questions(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")
    return path


def test_questions_are_asked_and_counted(answerer, pretrained, tmp_path, run):
    """The model's own words are the right answers to two of three questions."""
    texts = ["你好", "月牙镇在哪里？谁住在那里？", "2 + 3 = ?"]
    said = [next(answerer.replies([[{"role": "user", "content": text}]], 48)) for text in texts]
    path = write_questions(
        tmp_path / "asked.jsonl",
        {"question": texts[0], "answer": said[0], "kind": "talk"},
        {"question": texts[1], "answer": said[1]},
        {"question": texts[2], "answer": "never \u2028 said", "kind": "talk"},
    )
    options = ["--ckpt", pretrained / "final", "--file", path, "--device", "cpu", "--dtype", "fp32"]
    done = run(script(questions), *options, "--json")
    assert json.loads(done.out) == {"talk": 0.5, "all": pytest.approx(2 / 3)}
    shown = run(script(questions), *options).out
    assert "50.0%" in shown and "66.7%" in shown and "expected never" in shown and texts[2] in shown


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"question": "a", "answer": "b"}\n{"question": "a"}\n', "asked.jsonl:2: not an object with"),
        ('{"question": "a", "ans', "asked.jsonl:1: not an object with"),
        ("[1]\n", "asked.jsonl:1: not an object with"),
        ("\n", "asked.jsonl: no questions in it"),
        (None, "asked.jsonl: cannot be read"),
    ],
)
def test_questions_that_cannot_be_read_are_named(content, what, tmp_path):
    path = tmp_path / "asked.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf8")
    with pytest.raises(UserError, match=what):
        read_questions(path)


# Report


REQUEST = PoliteRequest("请把书交给阿橘。", "你好！我把书交给阿橘。很高兴帮到你。", "你好！", "很高兴帮到你。")


@pytest.mark.parametrize(
    ("reply", "counts"),
    [
        ("你好！我把书交给阿橘。很高兴帮到你。", True),
        (" 你好！我把书交给别人。很高兴帮到你。\n", True),  # style is not content
        ("我把书交给阿橘。", False),
        ("你好！我把书交给阿橘。", False),
        ("我把书交给阿橘。很高兴帮到你。", False),
        ("你好！很高兴帮到你。", False),  # nothing in between
        ("你好！我把书交给阿橘。很高兴帮到你。再见", False),
        ("", False),
    ],
)
def test_a_style_is_its_two_ends_with_something_between(reply, counts):
    assert in_style(reply, REQUEST) == counts


def test_the_rate_of_a_style_is_sampled_and_repeats(answerer, pretrained, tmp_path, run, monkeypatch):
    """Half of the replies are in style, a quarter the preferred answer."""
    requests, asked = [REQUEST] * 4, []
    replies = [REQUEST.answer, "你好！很久。很高兴帮到你。", "我把书交给阿橘。", ""]
    monkeypatch.setattr(Answerer, "replies", lambda *given: asked.append(given[-2:]) or replies)
    score = score_style(answerer, requests)
    assert (score.preferred, score.exact, score.answers) == (0.5, 0.25, 4)
    assert asked == [(Sampling(temperature=0.7), 0)]
    monkeypatch.undo()
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(vars(REQUEST), ensure_ascii=False) + "\n\n", encoding="utf8")
    printed = [run(script(style), "--ckpt", pretrained / "final", "--file", path, "--json").out for _ in range(2)]
    assert printed[0] == printed[1] and json.loads(printed[0])["answers"] == 1


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "no questions in it"),
        ('{"question": "Q", "answer": "A"}\n', ":1: not an object with"),
        (None, "cannot be read"),
    ],
)
def test_polite_requests_that_cannot_be_read_are_named(content, what, tmp_path):
    path = tmp_path / "requests.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf8")
    with pytest.raises(UserError, match=f"{path}.*{what}"):
        read_polite_requests(path)


def test_the_report_compares_the_stages_on_held_out_text(pretrained, world, tmp_path, run):
    shutil.copytree(pretrained, tmp_path / "pretrain")
    few = [json.loads(line) for line in (world / "heldout_questions.jsonl").read_text(encoding="utf8").splitlines()]
    asked = write_questions(tmp_path / "asked.jsonl", *few[::60])
    done = run(script(report), "--out", tmp_path, "--questions", asked, "--samples", 2, "--dtype", "fp32")
    assert done.code == 0, done.err
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert rows[0][1:] == ["untrained", "pretrain"]
    assert [row[0] for row in rows[2:4]] == ["bits per byte", "exact answers"] and len(rows) > 5
    last = json.loads((pretrained / "metrics.jsonl").read_text(encoding="utf8").splitlines()[-1])
    untrained, trained = (float(cell) for cell in rows[2][1:])
    assert trained == pytest.approx(last["val_bits_per_byte"], abs=0.001) and untrained > trained + 0.5
    assert page.count("> **") == 2 and "![pretrain](pretrain.png)" in page
    assert (tmp_path / "report" / "pretrain.png").read_bytes().startswith(b"\x89PNG")
    assert "untrained" in done.out and str(tmp_path / "report" / "report.md") in done.out.replace("\n", "")


def test_the_report_holds_out_problems_of_a_file(pretrained, tmp_path, run):
    shutil.copytree(pretrained, tmp_path / "pretrain")
    rows = [{"question": f"What is {number} plus 1?", "answer": str(number + 1)} for number in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    given = ["--out", tmp_path, "--sums", tmp_path / "sums.jsonl", "--dtype", "fp32"]
    done = run(script(report), *given, "--val_fraction", 0.1)
    assert done.code == 0, done.err
    done = run(script(report), *given, "--val_fraction", 0)
    assert done.code == 2 and "nothing is held out; raise --val_fraction" in done.err


@pytest.mark.parametrize("stage", ["pretrain/step-3", "sft/final"])
def test_a_folder_without_finished_pretraining_is_named(stage, tmp_path, run):
    (tmp_path / stage).mkdir(parents=True)
    done = run(script(report), "--out", tmp_path)
    assert done.code == 2 and done.err.startswith(f"error: {tmp_path}: no finished pretraining in it")


# Chat


@pytest.fixture
def talk(pretrained, run, monkeypatch):
    """`talk(lines, *options)`: a session in which the person types these lines."""

    def talk(lines: str, *options: object):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        given = ["--ckpt", pretrained / "final", "--temperature", 0, "--max_new_tokens", 12, "--device", "cpu"]
        return run(script(chat), *given, *options)

    return talk


@pytest.fixture
def asked(monkeypatch) -> Iterator[list[list[dict]]]:
    """The conversations that the model was asked to continue."""
    seen, stream = [], Answerer.stream_reply

    def spy(self, messages, *rest):
        seen.append(list(messages))
        return stream(self, messages, *rest)

    monkeypatch.setattr(Answerer, "stream_reply", spy)
    return seen


def test_once_answers_and_ends(talk, answerer):
    done = talk("", "--once", "你好", "--dtype", "fp32")
    pieces = answerer.stream_reply([{"role": "user", "content": "你好"}], Sampling(temperature=0), 12)
    want = "".join(piece for piece, _ in pieces)
    assert done.code == 0 and done.out == want + "\n" and "tok/s]" in done.err


def test_the_history_grows_until_it_is_reset(talk, asked):
    done = talk("一\n\n二\n/reset\n三\n/quit\n四\n")
    assert done.code == 0 and "(forgotten)" in done.out
    assert [[message["content"] for message in messages if message["role"] == "user"] for messages in asked] == [
        ["一"], ["一", "二"], ["三"]
    ]  # fmt: skip
    roles = [message["role"] for message in asked[1]]
    assert roles == ["user", "assistant", "user"] and asked[1][1]["content"] in done.out


def test_bytes_that_are_no_text_are_told_of_and_the_conversation_goes_on(talk, asked, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO("一\n".encode() + b"\xc4\xe3\xba\xc3\n" + "二\n".encode()), encoding="utf-8")
    monkeypatch.setattr(io, "StringIO", lambda lines: typed)
    done = talk("")
    assert done.code == 0 and "error: not all of this is utf-8; set the terminal to UTF-8" in done.err
    assert [m["content"] for m in asked[-1] if m["role"] == "user"] == ["一", "二"] and len(asked) == 2


def test_the_system_prompt_can_be_set_and_cleared(talk, asked):
    done = talk("一\n/system 你是月牙镇的导游。\n二\n/system\n三\n", "--system", "短。")
    systems = [[m["content"] for m in messages if m["role"] == "system"] for messages in asked]
    assert systems == [["短。"], ["你是月牙镇的导游。"], []]
    assert all(len(messages) <= 2 for messages in asked)  # a new system prompt begins a new conversation
    assert "(system prompt: 你是月牙镇的导游。)" in done.out and "(system prompt: none)" in done.out


def test_an_unknown_command_shows_the_commands_and_asks_nothing(talk, asked):
    done = talk("/rest\n")
    assert done.out.count("/reset forgets the conversation, /system TEXT") == 2 and not asked


def test_a_conversation_that_is_too_long_says_so_and_goes_on(talk, asked):
    done = talk("嗯" * 3000 + "\n好\n")
    assert done.err.count("error: the conversation has") == 1 and "/reset" in done.err
    assert [len(messages) for messages in asked] == [1, 1] and done.code == 0


@torch.no_grad()
def test_int8_weights_answer_as_their_rounded_values_would(pretrained):
    folder = str(pretrained / "final")
    packed, rounded = Answerer.open(folder, "cpu", "fp32", quantize="int8"), Answerer.open(folder, "cpu", "fp32")
    ids, changed = torch.arange(100, 124)[None], 0
    exact = rounded.model(ids).logits
    for name, module in packed.model.named_modules():
        if isinstance(module, QuantizedLinear):
            rounded.model.get_submodule(name).weight.copy_(module.quantized.dense(torch.float32))
            changed += 1
        elif isinstance(module, Experts) and isinstance(module.down_proj, Int8Weight):
            twin = rounded.model.get_submodule(name)
            twin.gate_up_proj.copy_(module.gate_up_proj.dense(torch.float32))
            twin.down_proj.copy_(module.down_proj.dense(torch.float32))
            changed += 2
    logits = packed.model(ids).logits
    torch.testing.assert_close(logits, rounded.model(ids).logits)
    assert changed > 10 and 0 < (logits - exact).norm() / exact.norm() < 0.05
    prompt = ids[:, :9]
    plain = rounded.model.generate(prompt, max_new_tokens=20)
    for model in packed.model, rounded.model:
        assert torch.equal(model.generate(prompt, max_new_tokens=20, speculative=True, draft_tokens=2), plain)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--temperature", -1], "temperature"),
        (["--top_p", 0], "top_p"),
        (["--temperatur", 1], "temperatur"),
        (["--ckpt", "nowhere"], "nowhere.*: "),
        (["--speculative", "--repetition_penalty", 1.5, "--once", "a"], "speculative.*without repetition penalty"),
        (["--draft_tokens", -1], "--draft_tokens -1"),
        (["--quantize", "int3"], "--quantize int3"),
    ],
)
def test_a_wrong_option_is_one_line(options, what, talk):
    done = talk("", *options)
    assert done.code == 2 and re.match(f"error: .*{what}", done.err) and done.err.count("\n") == 1


def test_without_a_seed_answers_differ_and_with_one_they_repeat(talk):
    options = ["--once", "月牙镇", "--temperature", 1.5, "--top_p", 1]
    answers = [talk("", *options, "--seed", seed).out for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
