"""Multiple choice asks as is customary, scores by hand, and is at chance without skill."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import datasets
import pytest
from likelihoods import values

from errors import UserError
from eval.opened_model import OpenedModel, open_model
from eval.own_model import OwnModel
from eval.suites.choice_rows import ChoiceItem
from eval.suites.exact_match import ExactMatch
from eval.suites.multiple_choice import Asked, MultipleChoice, _means
from eval.suites.text_likelihood import TextLikelihood


def exam(folder: Path, count: int, seed: int = 0) -> Path:
    """Questions whose answers are in random places."""
    rng = random.Random(seed)
    for split, size in (("dev", 5), ("test", count)):
        (folder / split).mkdir(parents=True)
        rows = [f"What is {rng.randrange(1000)}?,{rng.random()},x,yes,no,{rng.choice('ABCD')}\n" for _ in range(size)]
        (folder / split / f"high_school_{split}.csv").write_text("".join(rows), encoding="utf8")
    return folder


@pytest.fixture
def untrained(tiny_model, tokenizer, tmp_path) -> OpenedModel:
    """A folder of this project with random weights."""
    tiny_model(vocab_size=600, max_position_embeddings=256).save_pretrained(tmp_path / "untrained")
    tokenizer.save(tmp_path / "untrained")
    return open_model(str(tmp_path / "untrained"), "cpu", "fp32")


@pytest.mark.parametrize("name", ["untrained", "peer"])
def test_a_model_that_knows_nothing_is_at_chance(name, request, tmp_path):
    """Whatever the form and the number of worked questions, chance lies in the interval, and the interval is narrow."""
    model, data = request.getfixturevalue(name), str(exam(tmp_path / "exam", 300))
    for form, shots in (("letters", 0), ("letters", 2), ("text", 0)):
        suite = MultipleChoice(data=data, form=form, shots=shots)
        items = suite.items(0)
        for score in suite.scores(items, suite.measure(model, items, 0)):
            assert (
                score.low < score.chance == 0.25 < score.high and score.high - score.low < 0.11 and score.items == 300
            )


def test_a_few_shot_prompt_is_the_customary_text(own, tmp_path, monkeypatch):
    (tmp_path / "dev").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "dev" / "high_school_dev.csv").write_text("Q1,a,b,c,d,C\nQ2,a,b,c,d,A\nQ3,a,b,c,d,B\n")
    (tmp_path / "test" / "high_school_test.csv").write_text("Q4,k,l,m,n,D\n")
    intro = "Questions about {subject}.\n\n"
    seen = []
    monkeypatch.setattr(
        OwnModel, "continuation_nats", lambda self, items: seen.extend(items) or [[0.0] * 4] * len(items)
    )

    def asked(**settings: object) -> tuple[str, list[str]]:
        suite = MultipleChoice(data=str(tmp_path), shots=2, intro=intro, **settings)
        seen.clear()
        suite.measure(own, suite.items(0), 0)
        decode = own.answerer.tokenizer.decode
        return decode(seen[0][0], skip_special_tokens=False), [decode(choice) for choice in seen[0][1]]

    listed = "\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    text = f"Questions about high school.\n\nQ1{listed} C\n\nQ2{listed} A\n\nQ4\nA. k\nB. l\nC. m\nD. n\nAnswer:"
    assert asked() == (text, [" A", " B", " C", " D"])
    worked = "Questions about high school.\n\nQ1\nAnswer: c\n\nQ2\nAnswer: a\n\nQ4\nAnswer:"
    assert asked(form="text") == (worked, [" k", " l", " m", " n"])
    chat = (
        "<s><|user|>Questions about high school.\n\nQ1\nAnswer:<|assistant|>c</s><|user|>Q2\nAnswer:<|assistant|>a</s>"
    )
    assert asked(form="text", chat=True) == (f"{chat}<|user|>Q4\nAnswer:<|assistant|>", ["k", "l", "m", "n"])


def test_accuracy_is_raw_and_for_each_character(tmp_path):
    suite = MultipleChoice(data="x", form="text")
    items = [Asked(ChoiceItem(subject, "Q", ("long text", "no"), answer), ()) for subject, answer in ("a0", "a0", "b1")
             for answer in [int(answer)]]  # fmt: skip
    # -9 over nine characters is better than -4 over two, and worse as it stands.
    rows = [
        {"nats": [-9.0, -4.0], "cut": False},
        {"nats": [-3.0, -4.0], "cut": False},
        {"nats": [-9.0, -4.0], "cut": False},
    ]
    scores = suite.scores(items, rows)
    assert values(scores) == {"acc": pytest.approx(2 / 3), "acc_norm": pytest.approx(2 / 3)}
    assert values(scores, "a") == {"acc": 0.5, "acc_norm": 1.0} and values(scores, "b") == {"acc": 1.0, "acc_norm": 0.0}
    assert values(scores, "mean of subjects") == {"acc": 0.75, "acc_norm": 0.5}
    assert {score.chance for score in scores} == {0.5}


def test_more_worked_questions_than_there_are_is_one_line(tmp_path):
    with pytest.raises(UserError, match="high_school has 5 questions in split 'dev'; set shots to 5 or less"):
        MultipleChoice(data=str(exam(tmp_path, 3)), shots=6).items(0)


def test_one_list_of_worked_questions_serves_all_subjects(tmp_path):
    rows = [{"question": f"Q{n}", "choices": ["a", "b"], "answer": 0, "subject": f"s{n % 2}"} for n in range(6)]
    for name, part in (("asked", rows), ("worked", [{**row, "subject": "any"} for row in rows[:2]]), ("few", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf8")
    settings = dict(data=str(tmp_path / "asked.jsonl"), shots=2)
    items = MultipleChoice(**settings, shots_data=str(tmp_path / "worked.jsonl")).items(0)
    assert len(items) == 6 and {tuple(shot.question for shot in item.shots) for item in items} == {("Q0", "Q1")}
    own = MultipleChoice(**settings, shots_data=str(tmp_path / "asked.jsonl")).items(0)
    assert {tuple(shot.question for shot in item.shots) for item in own} == {("Q0", "Q2"), ("Q1", "Q3")}
    with pytest.raises(UserError, match=r"few\.jsonl: s0 has 1 questions in split 'dev'; set shots to 1 or less"):
        MultipleChoice(**settings, shots_data=str(tmp_path / "few.jsonl")).items(0)


def test_the_hubs_test_split_is_measured(monkeypatch):
    asked = []

    def load(name: str, subset: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((name, subset, split))
        return datasets.IterableDataset.from_generator(
            lambda: iter([{"question": "1+1", "answer": "#### 2", "text": "x"}])
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert ExactMatch(data="openai/gsm8k:main").items(0)[0].answer == "2"
    assert TextLikelihood(data="some/texts", split="validation").items(0) == [("some/texts", "x")]
    assert asked == [("openai/gsm8k", "main", "test"), ("some/texts", None, "validation")]


def test_the_interval_of_the_mean_over_subjects():
    """Each subject's share with two right and two wrong answers more: 8 of 10 and 5 of 10."""
    sure, torn = [(True, False, 0.25)] * 6, [(True, False, 0.25)] * 3 + [(False, False, 0.25)] * 3
    width = 1.959964 * math.sqrt((0.8 * 0.2 + 0.5 * 0.5) / 6) / 2
    found = _means([sure, torn])[0]
    assert (found.value, found.low, found.high) == pytest.approx((0.75, 0.75 - width, min(0.75 + width, 1)), abs=1e-4)
