"""Tasks are opened by name and file, ask as is customary, and judge replies that are made up as they should."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_files import write

from errors import UserError
from eval.tasks import replies
from eval.tasks.choices import MultipleChoice
from eval.tasks.opened import FOLDER, KINDS, open_task, open_tasks
from eval.tasks.problems import ExactMatch, judge
from eval.tasks.replies import Quality, Questions, Style, as_text, chinese_share, distinct, first_answer, judge_style
from eval.tasks.texts import Text
from text.chats.problems import open_problems


def write_lines(path: Path, *rows: dict) -> str:
    return write(path, map(json.dumps, rows))


def problems(path: Path, *rows: tuple[str, str]) -> str:
    return write(path, [{"question": question, "answer": answer} for question, answer in rows])


# Names and files

BUILT_IN = sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_task_has_the_keys_that_follow_from_its_settings(name):
    """So that lm-evaluation-harness by itself, which reads the keys, measures the same."""
    task = open_task(name, theirs_first=False)
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf8"))
    assert task.name == content.pop("task") == name and content.pop("include") == f"_{task.kind}.yaml"
    assert content.pop("dataset_kwargs")["data"] == task.settings.data and type(task.settings) is KINDS[task.kind]
    keys = task.settings.keys()
    assert {"target_delimiter": " ", **content} == {"target_delimiter": " ", **keys}


def test_names_are_of_this_project_or_of_lm_eval(tmp_path):
    names = {"ceval", "cmmlu-5-shot", "mmlu", "gsm8k", "demo-questions", "demo-text", "arithmetic-sampled"}
    assert names <= set(BUILT_IN)
    assert open_task("ceval-5-shot=some/where").settings.data == "some/where"
    assert open_task("ceval-5-shot").settings.shots == 5 and open_task("arc_easy").settings is None
    assert open_task("mmlu").settings is None and open_task("mmlu=data/mmlu").settings.shots == 0
    assert open_task("mmlu", theirs_first=False).settings.data == "data/mmlu"
    assert open_task("demo-favours").name == "demo-style"
    found = open_tasks("text=a/zh.txt, text=b/en.txt,mmlu=c")  # one task on two sets of data is two tasks
    assert {task.name: task.settings.data for task in found} == {"text": "a/zh.txt", "text-en": "b/en.txt", "mmlu": "c"}
    with pytest.raises(UserError, match="mmlu: is there twice"):
        open_tasks("mmlu,mmlu")
    # A file in lm-eval's form is left to it.
    (tmp_path / "mine.yaml").write_text("task: mine\ndoc_to_text: !function f.g\n")
    assert open_task(str(tmp_path / "mine.yaml")).settings is None


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("multiple_choise: {data: x}", "kind 'multiple_choise'; did you mean multiple_choice?"),
        ("text: {}", ".*required: data"),
        ("text: {data: x, windows: 3}", ".*windows"),
        ("text: {data: x, window: many}", ".*window"),
        ("text: {data: x, stride: 2000}", "stride 2000: must be from 1 to window"),
        ("questions: {data: x}\ntext: {data: x}", "must be one kind of task"),
        ("- text", "must be one kind of task"),
        ("text: {data: [", "not YAML"),
        ("", "must be one kind of task"),
        ("exact_match: {data: x, samples: 4}", "samples 4: greedy answers are all the same"),
        ("exact_match: {data: x, samples: 4, temperature: 1, k: [5]}", r"k \[5\]: each from 1 to samples = 4"),
        ("exact_match: {data: x, shots: 3}", "shots 3: .* give a file"),
        ("exact_match: {data: x, max_new_tokens: 0}", ".*must be 1 or more"),
        ("questions: {data: x, max_new_tokens: 0}", ".*must be 1 or more"),
        ("quality: {data: x, temperature: -1}", ".*temperature 0 or more"),
    ],
)
def test_a_file_that_is_wrong_is_named(content, what, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf8")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}(:\d+)?: {what}") as error:
        open_task(str(path))
    assert "\n" not in str(error.value)


# Choices


def test_a_few_shot_prompt_is_the_customary_text(tmp_path):
    for split, text in (("dev", "Q1,a,b,c,d,C\nQ2,a,b,c,d,A\nQ3,a,b,c,d,B\n"), ("test", "Q4,k,l,m,n,D\n")):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"high_school_{split}.csv").write_text(text)

    def asked(**settings: Any) -> dict[str, Any]:
        (doc,) = MultipleChoice(data=str(tmp_path), shots=2, intro="About {subject}.\n\n", **settings).docs()
        return doc

    listed, doc = "\nA. a\nB. b\nC. c\nD. d\nAnswer:", asked()
    assert doc["prompt"] == (
        f"About high school.\n\nQ1{listed} C\n\nQ2{listed} A\n\nQ4\nA. k\nB. l\nC. m\nD. n\nAnswer:"
    )
    assert (doc["choices"], doc["answer"], doc["group"]) == (["A", "B", "C", "D"], 3, "high_school")
    doc = asked(form="text", separator="")
    assert doc["prompt"] == "About high school.\n\nQ1\nAnswer:c\n\nQ2\nAnswer:a\n\nQ4\nAnswer:"
    assert doc["choices"] == ["k", "l", "m", "n"] and "turns" not in doc
    turns = asked(form="text", chat=True)["turns"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    want = ["About high school.\n\nQ1\nAnswer:", "c", "Q2\nAnswer:", "a", "Q4\nAnswer:"]
    assert [turn["content"] for turn in turns] == want
    with pytest.raises(UserError, match="high_school has 3 questions in split 'dev'; set shots to 3 or less"):
        MultipleChoice(data=str(tmp_path), shots=6).docs()


def test_one_list_of_worked_questions_serves_all_subjects(tmp_path):
    rows = [{"question": f"Q{n}", "choices": ["a", "b"], "answer": 0, "subject": f"s{n % 2}"} for n in range(6)]
    for name, part in (("asked", rows), ("worked", [{**row, "subject": "any"} for row in rows[:2]]), ("few", rows[:1])):
        write_lines(tmp_path / f"{name}.jsonl", *part)

    def worked(name: str) -> set[tuple[str, ...]]:
        data, shots = (str(tmp_path / f"{part}.jsonl") for part in ("asked", name))
        docs = MultipleChoice(data=data, shots_data=shots, shots=2).docs()
        assert len(docs) == 6
        return {tuple(re.findall(r"Q\d", doc["prompt"])[:2]) for doc in docs}

    assert worked("worked") == {("Q0", "Q1")} and worked("asked") == {("Q0", "Q2"), ("Q1", "Q3")}
    with pytest.raises(UserError, match=r"few\.jsonl: s0 has 1 questions in split 'dev'; set shots to 1 or less"):
        worked("few")


# Texts


def test_a_text_file_is_one_document_and_a_row_is_one(world, tmp_path):
    (doc,) = Text(data=str(world / "heldout.txt")).docs()
    assert doc["text"] == (world / "heldout.txt").read_text(encoding="utf8")
    path = write_lines(tmp_path / "t.jsonl", *({"body": text} for text in ("a", "", "b", "\ud83d", "c")))
    docs = Text(data=f"{path},{world / 'heldout.txt'}", column="body").docs()
    assert [doc["text"] for doc in docs[:-1]] == ["a", "b", "\ufffd", "c"] and docs[0]["group"] == path
    assert [doc["text"] for doc in Text(data=path, column="body").docs(2)] == ["a", "\ufffd"]  # of each source


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", '{"text": "x"}\n{"txt": "y"}\n', ":2: no text in column 'text', the columns are 'txt'; set column"),
        ("a.jsonl", '{"text": 3}\n', r":1: no text in column 'text'"),
        ("a.jsonl", '{"text": "x"}\n{"te\n', r":2: broken JSON"),
        ("a.jsonl", '{"text": ""}\n', r": no text in it"),
        ("a.txt", "", r": no text in it"),
        ("b.txt", "missing", ""),
    ],
)
def test_a_text_that_cannot_be_scored_is_one_line(name, content, what, tmp_path):
    path = tmp_path / name
    path.with_name(name.replace("b", "c")).write_text(content, encoding="utf8")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}{what}") as error:
        Text(data=str(path)).docs()
    assert "\n" not in str(error.value)


def test_the_hubs_test_split_is_measured(monkeypatch):
    import datasets

    asked = []

    def load(name: str, subset: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((name, subset, split))
        row = {"question": "1+1", "answer": "#### 2", "text": "x"}
        return datasets.IterableDataset.from_generator(lambda: iter([row]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert ExactMatch(data="openai/gsm8k:main").docs()[0]["answer"] == "2"
    assert Text(data="some/texts", split="validation").docs() == [{"group": "some/texts", "text": "x"}]
    assert asked == [("openai/gsm8k", "main", "test"), ("some/texts", None, "validation")]


# Problems


def test_answers_to_problems_are_compared_as_mathematics(tmp_path):
    data = problems(tmp_path / "p.jsonl", ("1+1?", "so it is #### 2"), ("half?", "1/2"), ("half?", "1/2"), ("3?", "3"))
    docs = ExactMatch(data=data).docs()
    assert len(docs) == 4  # a question that is asked twice counts twice
    given = ("The answer is 2.", "\\boxed{\\frac{1}{2}}", "0.5", "4")
    found = [judge(doc, [reply]) for doc, reply in zip(docs, given, strict=True)]
    assert found == [{"exact_match": 1.0}] * 3 + [{"exact_match": 0.0}]
    with pytest.raises(UserError, match=r"p\.jsonl:2: the answer is empty; correct the row"):
        ExactMatch(data=problems(tmp_path / "p.jsonl", ("1+1?", "2"), ("2+2?", " "))).docs()


def test_several_samples_give_pass_at_k_and_the_majority(tmp_path):
    data = problems(tmp_path / "p.jsonl", ("1+1?", "2"), ("2+2?", "4"))
    settings = ExactMatch(data=data, samples=4, temperature=1.0, k=[1, 2, 4])
    assert settings.keys()["repeats"] == 4 and settings.keys()["generation_kwargs"]["do_sample"]
    first, second = settings.docs()
    # 2 of 4: 1 - C(2,2)/C(4,2) = 5/6; 1 of 4: 1 - C(3,2)/C(4,2) = 1/2. The first vote is a draw, the second is lost.
    want = {"pass@1": 0.5, "pass@2": pytest.approx(5 / 6), "pass@4": 1.0, "maj@4": 0.5}
    assert judge(first, [["2", "3", "it is 2", "3"]]) == want
    want = {"pass@1": 0.25, "pass@2": 0.5, "pass@4": 1.0, "maj@4": 0.0}
    assert judge(second, [["5", "7", "5.0", "4"]]) == want


def test_worked_problems_come_first_as_turns_or_as_text(tmp_path):
    shots = problems(tmp_path / "s.jsonl", ("S1", "A1 #### 1"), ("S2", "A2 #### 2"))
    data = problems(tmp_path / "p.jsonl", ("Q", "3"))
    (doc,) = ExactMatch(data=data, shots=2, shots_data=shots, system="Be brief.").docs()
    turns = [turn["content"] for turn in doc["turns"]]
    assert turns == ["Be brief.", "S1", "A1 #### 1", "S2", "A2 #### 2", "Q"]
    (more,) = ExactMatch(data=data, shots=3, shots_data=f"{shots},{shots}").docs()  # of two places
    assert [turn["content"] for turn in more["turns"][::2]] == ["S1", "S2", "S1", "Q"]
    assert as_text(doc["turns"]) == (
        "Be brief.\n\nQuestion: S1\nAnswer: A1 #### 1\n\nQuestion: S2\nAnswer: A2 #### 2\n\nQuestion: Q\nAnswer:"
    )
    assert first_answer(" It is 3.\n\nQuestion: 4?\nAnswer: 5") == first_answer("\n\nIt is 3.\nQuestion:") == "It is 3."


def test_the_generators_held_out_sums_are_asked():
    docs = ExactMatch(data="arithmetic:1-2", problems=6).docs()
    sums = open_problems("arithmetic:1-2")
    assert [doc["problem"] for doc in docs] == sums.held_out(6)
    assert [doc["group"] for doc in docs] == ["level 1", "level 2"] * 3
    assert not {doc["question"] for doc in docs} & {sums.problem(number, 0).question for number in range(500)}
    assert len(ExactMatch(data="arithmetic:1", problems=6).docs(4)) == 4


# Replies


def test_a_limit_takes_items_that_are_evenly_spaced(world):
    task = Questions(data=str(world / "heldout_questions.jsonl"))
    docs = task.docs()
    assert task.docs(10) == [docs[number * len(docs) // 10] for number in range(10)]
    assert len({doc["group"] for doc in task.docs(10)}) > 1


def test_polite_requests_answered_in_style_are_counted(tmp_path):
    row = {"question": "Q", "answer": "你好！我去。再见。", "opening": "你好！", "closing": "再见。"}
    (doc,) = Style(data=write_lines(tmp_path / "f.jsonl", row)).docs()
    found = [judge_style(doc, [reply]) for reply in ("你好！我去。再见。", "你好！我不去。再见。", "我去。", "")]
    assert [tuple(values.values()) for values in found] == [(1.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.0, 0.0)]


def test_repetition_variety_and_language_are_counted_in_words():
    # The runs of four words: abcd bcda cdab dabc abcd. Fewer than four words repeat none.
    shares = {"a b c d e f": 0.0, "a b c d a b c d": 1 - 4 / 5, "好好好好好好": 1 - 1 / 3, "a b c": 0.0, "": 0.0}
    assert {text: replies.repetition(text) for text in shares} == pytest.approx(shares)
    assert distinct(["a b a", "B c"], 1) == 3 / 5 and distinct(["a b a", "b c"], 2) == 1.0
    assert chinese_share("我 like 猫, 3!") == 0.5 and chinese_share("！？") == 0.0


def test_answers_are_described_without_a_judge(tmp_path):
    data = write_lines(tmp_path / "p.jsonl", {"prompt": "你好吗？"}, {"prompt": "Who are you?"})
    first, second = Quality(data=data).docs()
    reply = "<think>\n想\n</think>\n<answer>\n我很好\n</answer>"
    found = replies.describe(first, [reply])
    assert (found["characters"], found["empty"]) == (len(reply), 0.0)
    assert found["strict_format"] == found["loose_format"] == found["own_language"] == 1.0
    assert 0 < found["chinese"] < 1 and replies.distinct_1([found["distinct_1"]]) < 1
    found = replies.describe(second, [""])
    assert found["empty"] == 1.0 and found["own_language"] == 0.0 and "chinese" not in found
