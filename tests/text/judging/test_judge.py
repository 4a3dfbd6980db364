"""The judge of answers: where an answer is looked for, what is taken of it, and what equals the reference."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest

import dataset
from errors import UserError
from text.chats.problems import to_problem
from text.judging.answers import declared_answer, final_answer, kind_of_answer, problem_with
from text.judging.judge import judge
from text.judging.pieces import pieces
from text.judging.quantity import as_number, plain
from text.judging.verifier import Verifier, shared_verifier

ROWS = Path(__file__).parents[2] / "data" / "answers.jsonl"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take longer than a judge would wait."""
    monkeypatch.setattr(shared_verifier(), "seconds", 60.0)


def test_every_reply_is_judged_as_a_person_judges_it():
    rows = [json.loads(line) for line in ROWS.read_text("utf8").splitlines()]
    differing = [row for row in rows if judge(row["answer"], row["reply"]).right != row["right"]]
    assert len(rows) > 300 and differing == []


@pytest.mark.parametrize(
    ("reply", "taken"),
    [
        ("<think>\\boxed{1}</think>\\boxed{2} #### 3\nThe answer is 4. And 5.", "2"),
        ("#### 3\nThe answer is 4. And 5.", "3"),
        ("The answer is 4. And 5.", "4"),
        ("It is 4. And 5.", "5"),
        ("<answer>6</answer>", "6"),
        ("<answer>3 red apples</answer>", "3"),
        ("Room 6.\nFirst 5, then -7 clips.\nThanks!", "-7"),
        ("\\boxed{6 or 7}", None),
        ("<answer>5 6 7</answer>", None),
        ("<answer>6</answer><answer>7</answer>", None),
        ("I do not know.", None),
    ],
)  # fmt: skip
def test_places_are_searched_in_one_order_and_give_one_guess(reply, taken):
    assert final_answer(reply, "7") == judge("7", reply).taken == taken


def test_what_is_declared_is_taken_whole():
    assert declared_answer("<answer>3 red apples</answer>") == "3 red apples"
    assert declared_answer("So:\n#### 3 red apples\nDone.") == "3 red apples"


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("-1/2", "number"), ("18 dollars", "number"), ("25%", "number"), ("1e20", "number"), ("B", "choice"),
        ("(B)", "choice"), ("(3,4)", "formula"), ("x^2+1", "formula"), ("5!", "formula"), (r"\sqrt{2}", "formula"),
        ("10:30", "text"), ("12 Angry Men", "text"), ("Paris", "text"), ("月牙镇", "text"), ("2024-05-01", "text"),
    ],
)  # fmt: skip
def test_references_have_kinds(reference, kind):
    assert kind_of_answer(reference) == kind


@pytest.mark.parametrize(
    "reference",
    [
        "(3,4)", "[0,1]", "x^2+1", "3+4i", "2^10", "1,2", "x>2", r"\text{B}", "16π", "-$5", "50%", "10:30",
        "3 + 4", "7!", "-1/2", "1,000", r"\frac{1}{2}", "Paris", "月牙镇", "x=3",
    ],
)  # fmt: skip
def test_every_usable_reference_matches_itself(reference):
    assert problem_with(reference) is None
    assert judge(reference, rf"\boxed{{{reference}}}").right and judge(reference, f"<answer>{reference}</answer>").right


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("48+24 = 72 clips", ["48+24 = 72"]), ("5个-3个", ["5个-3"]), ("是-7", ["-7"]), ("a (3,4) point", ["(3,4)"]),
        ("H2O and 25 m^2", ["25 m^2"]), ("3x + 5, then 2", ["3x + 5", "2"]), (r"2\sqrt{3} cm", [r"2\sqrt{3}"]),
        ("round-trip 72", ["72"]),
    ],
)  # fmt: skip
def test_numbers_and_formulas_are_found_whole(text, found):
    assert [piece.text for piece in pieces(text)] == found


def test_one_spelling_of_a_number():
    spelled = {
        "１２": "12", "25 m²": "25 m^2", "25㎡": "25m^2", "1½": "1 1/2", r"1{,}500": "1,500", r"1\,500": "1,500",
        "1\u202f500": "1,500",
        r"\$29": "$29", r"\frac{1}{2}": "1/2", r"1\frac12": "1 1/2", r"25\text{ cm}^2": "25 cm^2",
        "**-5**": "-5", "−7": "-7", r"90^\circ": "90°", "负5": "-5", r"1.5\times10^{3}": "1.5*10^3",
    }  # fmt: skip
    assert {text: " ".join(plain(text).split()) for text in spelled} == spelled


def test_text_of_any_size_is_judged_in_linear_time(monkeypatch):
    """Models write such things, and rewards judge millions of them; nothing here may depend on a clock."""
    monkeypatch.setattr("text.judging.judge.shared_verifier", lambda: Unreadable())
    parts = (
        "( ", "1 ", "1,", r"\text{", "*a ", r"\boxed{", "- ", "((1)", "负", "=1", "x^", "和1", " ", "<1 ", "1 or ",
        "**", "$",
    )  # fmt: skip
    for part in parts:
        for reference in ("7", "B", "x+1", "Paris", "1,2"):
            assert judge(reference, part * 20_000).right is False


def test_nothing_that_a_model_writes_breaks_the_judge(monkeypatch):
    monkeypatch.setattr("text.judging.judge.shared_verifier", lambda: Unreadable())
    signs = r"1 23 , . - + ( ) [ ] { } \ \frac \boxed{ #### 答案是 选 B x ^ _ = < / % $ \( \text{ ½ ² 万 个 or 和 ** √"
    more = r"π ! : e5 1/2 、 ㎡ m^2 \begin{pmatrix} & << >> 3rd <answer> </answer>"
    parts = [" ", "\n", "answer is", *signs.split(), *more.split()]
    draw = random.Random(0)
    for _ in range(3000):
        reference, reply = ("".join(draw.choices(parts, k=draw.randint(1, most))) for most in (4, 14))
        judge(reference, reply)


class Unreadable:
    """A verifier that can read nothing, to try what comes before it."""

    def equal(self, expected: str, given: str) -> None:
        return None


def run_judge(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["dataset.py", "judge", *arguments])
    dataset.main()


def test_the_command_shows_each_verdict_and_counts_agreement(monkeypatch, capsys, tmp_path):
    path = tmp_path / "replies.jsonl"
    rows = [
        {"answer": "x\n#### 72", "reply": "48+24 = 72", "right": True},
        {"answer": 1e20, "reply": "no idea", "right": True},
        {"answer": "B", "reply": "(B)"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    run_judge(monkeypatch, str(path), "--json")
    shown = capsys.readouterr()
    assert [json.loads(line) for line in shown.out.splitlines()] == [
        {"right": True, "taken": "72"}, {"right": False, "taken": None}, {"right": True, "taken": "B"},
    ]  # fmt: skip
    assert shown.err.splitlines()[-1] == "1 of 2 agree"
    run_judge(monkeypatch, str(path))
    assert "wrong, the row says otherwise: '100000000000000000000' expected" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row",
    ['{"answer": "1"}', '{"reply": "1"}', '{"answer": null, "reply": "1"}', "[1]", '{"answer": NaN, "reply": "1"}'],
)
def test_a_row_without_answer_or_reply_is_named_by_its_line(monkeypatch, tmp_path, row):
    path = tmp_path / "replies.jsonl"
    path.write_text(f'{{"answer": "1", "reply": "1"}}\n{row}\n')
    with pytest.raises(UserError, match=r"replies.jsonl:2: "):
        run_judge(monkeypatch, str(path))


@pytest.mark.parametrize(
    ("answer", "bare"),
    [
        ("so\n#### 42 dollars", "42 dollars"), ("#### 25%", "25%"), (r"#### \frac{1}{2}", r"\frac{1}{2}"),
        ("#### about 42 of them", "42"), ("#### 7\nDone.", "7"), (1e20, "1" + "0" * 20), (0.00001, "0.00001"), (7, "7"),
    ],
)  # fmt: skip
def test_references_of_gsm8k_and_json_are_read(answer, bare):
    assert to_problem({"question": "?", "answer": answer}).answer == bare


def test_plain_numbers_are_compared_as_math_verify_compares_them():
    pairs = ["1/2 0.5", "1,000 1000", "1000 1,000.0", "3 3.1", "-2 2", "0.25 1/4", "2/3 0.5"]
    for expected, given in map(str.split, pairs):
        assert (as_number(expected) == as_number(given)) == shared_verifier().equal(expected, given), (expected, given)


def test_numbers_are_read_exactly():
    read = {"12": 12, " 1,234,567 ": 1234567, "1/3": Fraction(1, 3), "-0.5。": Fraction(-1, 2), "+7": 7, "１２": 12}
    read[".5"] = Fraction(1, 2)
    assert {text: as_number(text) for text in read} == read
    assert [as_number(text) for text in ("", "12a", "1,23", "1/0", "twelve", "1 2", "9" * 300)] == [None] * 7


@pytest.mark.parametrize("answer", ["", "  ", "???", "a" * 201, "first\nsecond", "\\frac{1}{2}" * 30])
def test_answers_that_no_verifier_can_parse(answer):
    assert problem_with(answer) is not None


def test_a_formula_that_never_ends_is_given_up_and_the_next_is_answered():
    verifier = Verifier(seconds=60.0)
    try:
        assert verifier.equal("1/2", r"\frac{1}{2}") is True
        verifier.seconds, begin = 1.0, time.monotonic()
        assert verifier.equal("3", "9^{9^{9^{9}}}") is None
        assert time.monotonic() - begin < 20 and verifier.timeouts == 1
        verifier.seconds = 60.0
        assert verifier.equal("3", "4") is False and verifier.timeouts == 1
    finally:
        verifier.stop()


def test_verification_works_from_any_thread():
    """math-verify's own time limits are signals, which only the main thread may set."""
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: shared_verifier().equal(str(n), rf"\frac{{{2 * n}}}{{2}}"), range(4)))
    assert answers == [True] * 4


def test_a_verifier_runs_this_code_and_one_that_cannot_start_is_an_error_and_no_wrong_answer(monkeypatch):
    started, begin = [], subprocess.Popen
    monkeypatch.setattr("text.judging.verifier.sys.executable", "false")
    monkeypatch.setattr(subprocess, "Popen", lambda *given, cwd, **more: started.append(cwd) or begin(*given, **more))
    with pytest.raises(UserError, match="math-verify does not start; pip install"):
        Verifier().equal("1/2", r"\frac{1}{2}")
    assert (started[0] / "text" / "judging" / "verifier.py").is_file()  # whatever else is installed
