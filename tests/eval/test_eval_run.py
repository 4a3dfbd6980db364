"""eval/run.py measures, goes on where it was stopped, and says in one line what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import eval.suites.measuring
from cli import call
from errors import UserError
from eval.opened_model import open_model
from eval.run import run as measure_all
from eval.score_files import out_folder, read_scores
from eval.suites.kinds import KINDS
from eval.suites.measured_rows import MeasuredRows
from eval.suites.measuring import measure
from eval.suites.replies import Questions
from eval.suites.suite import BUILT_IN, Score, open_suite, open_suites


def main() -> None:
    """The script, as its last line calls it."""
    call(measure_all, "")


@pytest.fixture
def suites(tmp_path, world) -> Path:
    """A folder with a suite of text and one of questions."""
    lines = (world / "heldout_questions.jsonl").read_text(encoding="utf8").splitlines(keepends=True)[::20]
    (tmp_path / "q.jsonl").write_text("".join(lines), encoding="utf8")
    (tmp_path / "t.txt").write_text((world / "heldout.txt").read_text(encoding="utf8")[:2000], encoding="utf8")
    for name, content in {
        "words": {"text": {"data": str(tmp_path / "t.txt")}},
        "asked": {"questions": {"data": str(tmp_path / "q.jsonl"), "max_new_tokens": 4, "chunk": 4}},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf8")
    return tmp_path


def test_suites_are_measured_and_written_as_json_page_and_picture(pretrained, suites, run):
    out = suites / "out"
    given = ["--ckpt", pretrained / "final", "--out", out, "--device", "cpu", "--dtype", "fp32"]
    done = run(main, *given, "--suite", f"{suites / 'words.yaml'},{suites / 'asked.yaml'}")
    assert done.code == 0, done.err
    found = json.loads((out / "scores.json").read_text(encoding="utf8"))
    bits, perplexity = found["suites"]["words"]["scores"]
    assert bits["metric"] == "bits_per_byte" and 0 < bits["value"] < 8 and perplexity["value"] > 1
    asked = found["suites"]["asked"]
    assert asked["items"] == len((suites / "q.jsonl").read_text(encoding="utf8").splitlines())
    assert asked["settings"]["kind"] == "Questions" and found["weights"]["dtype"] == "fp32"
    page = (out / "scores.md").read_text(encoding="utf8")
    assert f"| words | all | bits_per_byte | {bits['value']:.4f} |" in page and "## asked" in page
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert "bits_per_byte" in done.out and str(out / "scores.json") in done.out
    # Another suite joins; what other weights had is forgotten.
    assert run(main, *given, "--suite", f"{suites / 'asked.yaml'}", "--limit", 3).code == 0
    again = read_scores(out)["suites"]
    assert again["words"] == found["suites"]["words"] and again["asked"]["items"] == 3
    assert run(main, *given, "--suite", f"{suites / 'words.yaml'}", "--dtype", "bf16").code == 0
    assert list(read_scores(out)["suites"]) == ["words"]


def test_other_data_can_be_named_with_the_suite(pretrained, suites, run):
    (suites / "other.txt").write_text("一二三", encoding="utf8")
    entry = f"{suites / 'words.yaml'}={suites / 'other.txt'}"
    done = run(main, "--ckpt", pretrained / "final", "--out", suites / "out", "--suite", entry)
    assert done.code == 0, done.err
    assert read_scores(suites / "out")["suites"]["words"]["settings"]["data"] == str(suites / "other.txt")


class Stopped(Exception):
    pass


def test_a_measurement_that_was_killed_goes_on_to_the_same_rows(pretrained, suites):
    model, weights = open_model(str(pretrained / "final"), "cpu", "fp32"), {"ckpt": "a"}
    suite = Questions(data=str(suites / "q.jsonl"), max_new_tokens=4, chunk=4)
    whole = measure("asked", suite, suite.items(0), model, weights, suites / "whole")
    lines = (suites / "whole" / "asked.jsonl").read_bytes().splitlines(keepends=True)
    measured = []

    class Dying(Questions):
        left = 2

        def measure(self, model, items, seed):
            self.left -= 1
            if self.left < 0:
                raise Stopped
            return super().measure(model, items, seed)

    class Counting(Questions):
        def measure(self, model, items, seed):
            measured.append((seed, len(items)))
            return super().measure(model, items, seed)

    for kind in (Dying, Counting):
        kind.__name__ = "Questions"  # the same suite to the file
    settings = dict(data=suite.data, max_new_tokens=4, chunk=4)
    with pytest.raises(Stopped):
        measure("asked", Dying(**settings), suite.items(0), model, weights, suites / "cut")
    path = suites / "cut" / "asked.jsonl"
    assert path.read_bytes().splitlines(keepends=True) == lines[: 1 + 8]
    for torn in (b"", lines[9], lines[9] + lines[10][:7]):  # killed while a chunk was being written
        path.write_bytes(b"".join(lines[:9]) + torn)
        measured.clear()
        again = measure("asked", Counting(**settings), suite.items(0), model, weights, suites / "cut")
        assert measured[0] == (8, 4) and sum(count for _, count in measured) == whole.items - 8
        assert again.scores == whole.scores and path.read_bytes().splitlines(keepends=True) == lines
    measured.clear()
    measure("asked", Counting(**settings), suite.items(0), model, weights, suites / "cut")
    assert not measured  # all is known


def test_rows_of_another_model_or_setting_are_not_taken(tmp_path):
    facts = {"model": {"ckpt": "a"}, "items": 4}
    with MeasuredRows(tmp_path / "x.jsonl", facts, 2) as rows:
        rows.add([{"a": 1}, {"a": 2}])
    assert MeasuredRows(tmp_path / "x.jsonl", facts, 2).rows == [{"a": 1}, {"a": 2}]
    other = MeasuredRows(tmp_path / "x.jsonl", {**facts, "model": {"ckpt": "b"}}, 2)
    assert other.rows == [] and other.started_anew == f"{tmp_path / 'x.jsonl'}: held other measurements; started anew"


def test_rows_of_a_file_that_was_changed_are_not_taken(own, suites):
    path = suites / "q.jsonl"
    settings = dict(data=str(path), max_new_tokens=4, chunk=4)
    before = Questions(**settings).items(0)
    measure("asked", Questions(**settings), before, own, {}, suites / "out")
    rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
    rows[0]["question"] = "2+2?"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    asked = []

    class Counting(Questions):
        def measure(self, model, items, seed):
            asked.extend(items)
            return super().measure(model, items, seed)

    Counting.__name__ = "Questions"
    after = Counting(**settings).items(0)
    measure("asked", Counting(**settings), after, own, {}, suites / "out")
    assert asked == after and len(after) == len(before)


def test_results_stand_in_the_run_of_the_checkpoint(pretrained, tmp_path):
    assert out_folder(str(pretrained / "final")) == pretrained / "eval" / "final"
    (tmp_path / "theirs").mkdir()
    assert out_folder(str(tmp_path / "theirs")) == Path("out/eval/theirs")
    assert out_folder("some/model.q8.gguf") == Path("out/eval/model.q8")


def test_every_built_in_suite_can_be_opened():
    names = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
    assert {"ceval", "cmmlu-5-shot", "mmlu", "gsm8k", "demo-questions", "demo-text", "arithmetic-sampled"} <= set(names)
    for name in names:
        opened, suite = open_suite(name, KINDS)
        assert opened == name and type(suite) in KINDS.values() and suite.data
    assert open_suite("ceval-5-shot=some/where", KINDS)[1].data == "some/where"
    assert open_suite("ceval-5-shot", KINDS)[1].shots == 5 and open_suite("mmlu", KINDS)[1].shots == 0


def test_one_suite_on_two_sets_of_data_is_two_suites():
    found = open_suites("text=a/zh.txt, text=b/en.txt,mmlu", KINDS)
    assert {name: suite.data for name, suite in found.items()} == {
        "text": "a/zh.txt", "text-en": "b/en.txt", "mmlu": "data/mmlu"
    }  # fmt: skip
    with pytest.raises(UserError, match="mmlu: is named twice"):
        open_suites("mmlu,mmlu", KINDS)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("multiple_choise: {data: x}", "kind 'multiple_choise'; did you mean multiple_choice?"),
        ("text: {}", ".*required: data"),
        ("text: {data: x, windows: 3}", ".*windows"),
        ("text: {data: x, window: many}", ".*window"),
        ("text: {data: x, stride: 2000}", "stride 2000: must be from 1 to window"),
        ("questions: {data: x}\ntext: {data: x}", "must be one kind of suite"),
        ("- text", "must be one kind of suite"),
        ("text: {data: [", "not YAML"),
        ("", "must be one kind of suite"),
    ],
)
def test_a_suite_that_is_wrong_is_named(content, what, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf8")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}(:\d+)?: {what}") as error:
        open_suite(str(path), KINDS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--suite", "demo-question"], "--suite demo-question: no such suite; did you mean demo-questions?"),
        (["--suite", "xyz"], "--suite xyz: no such suite; known are arithmetic, "),
        (["--suite", "nowhere.yaml"], "nowhere.yaml: No such file or directory; check the path"),
        (["--suite", ","], "--suite: names nothing"),
        (["--suite", "ceval=nowhere.csv"], "nowhere.csv: no such file"),
        (["--suite", "arithmetic", "--limit", "-1"], "--limit -1: give 0"),
        (["--suite", "arithmetic", "--ckpt", "nowhere"], "nowhere: no such checkpoint"),
        (["--suite", "arithmetic", "--device", "tpu"], "--device tpu: one of"),
    ],
)
def test_a_wrong_option_is_one_line(options, what, pretrained, tmp_path, run):
    done = run(main, "--ckpt", pretrained / "final", "--out", tmp_path / "out", *options)
    assert done.code == 2 and done.err.count("\n") == 1 and done.err.startswith("error: ") and what in done.err
    assert not (tmp_path / "out" / "scores.json").exists()


def test_folders_that_hold_no_model_are_one_line(tmp_path, pretrained):
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(b"GGUF")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF rest")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien" / "config.json").write_text('{"model_type": "unheard_of"}')
    for name, what in {
        "empty": "no config.json and no .gguf file in it",
        "two": "2 .gguf files; name one of them",
        "broken.gguf": "transformers does not open it",
        "alien": "transformers does not open it",
        "adapter": "is an adapter, not a model; give the checkpoint",
    }.items():
        with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / name))}: {re.escape(what)}") as error:
            open_model(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_without_transformers_a_foreign_folder_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers; pip install -r requirements\.txt"):
        open_model(str(tmp_path))


def test_scores_that_are_damaged_are_named(tmp_path):
    (tmp_path / "scores.json").write_text('{"suites": {"a": {}}}')
    with pytest.raises(UserError, match=r"scores\.json: not scores as eval/run\.py writes them"):
        read_scores(tmp_path)


def test_what_a_suite_says_is_what_the_page_says(tmp_path, pretrained, suites, monkeypatch):
    """Interval and chance stand on the line of their value; a question cut short is told of."""

    class Made:
        data, chunk = "x", 2

        def items(self, limit):
            return [1, 2]

        def measure(self, model, items, seed):
            return [{"cut": True}, {"cut": False}]

        def scores(self, items, rows):
            return [Score("all", "acc", 0.5, 0.25, 0.75, 0.25, 2), Score("a|b", "acc", 1.0, items=1)]

    monkeypatch.setattr(eval.suites.measuring, "asdict", lambda suite: {})
    measured = measure("made", Made(), [1, 2], None, {}, tmp_path)
    page = eval.score_files.markdown("m", [measured])
    assert "| made | all | acc | 50.0% | 25.0% to 75.0% | 25.0% | 2 |" in page
    assert "| made | a\\|b | acc | 100.0% |  |  | 1 |" in page and "made: 1 of 2 questions had no room" in page
