"""The generated world: the same bytes for a seed, nothing held out in the training text, natural and bounded rows."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

import world.__main__ as command
from text.chats.arithmetic import is_held_out
from text.judging.answers import conclusion
from world.cast import ATTRIBUTES, World
from world.corpus import FILES, generate
from world.facts import fact_questions
from world.grammar import sentences
from world.reading import scene
from world.requests import COURTESY, REQUESTS

SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world")
    generate(out, seed=SEED, scale=0.15)
    return out


@pytest.fixture(scope="module")
def town() -> World:
    return World.build(SEED)


@pytest.fixture(scope="module")
def rows(folder) -> list[str]:
    return read_rows(folder)


@pytest.fixture(scope="module")
def chats(folder) -> list[list[dict]]:
    return [row["messages"] for row in read_jsonl(folder / "sft.jsonl")]


@pytest.fixture(scope="module")
def questions(folder) -> list[dict]:
    return read_jsonl(folder / "heldout_questions.jsonl")


@pytest.fixture(scope="module")
def training_texts(folder, rows, chats) -> list[str]:
    talked = ["\n".join(message["content"] for message in chat) for chat in chats]
    return [*rows, *read_rows(folder, "lessons.csv"), *talked]


def read_rows(folder: Path, name: str = "pretrain.csv") -> list[str]:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers_in(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"[0-9]+", text)]


def is_chinese(text: str) -> bool:
    return re.search("[\u4e00-\u9fff]", text) is not None


def test_the_same_seed_gives_the_same_bytes_as_ever_and_another_other_facts(tmp_path):
    generate(tmp_path, seed=1, scale=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    digest = hashlib.sha256(b"".join((tmp_path / name).read_bytes() for name in FILES))
    assert digest.hexdigest() == "f0e8b36f3feb008ec0046821a08797dd65fd9d04bd915e6a8ce385ec025219d8"
    facts = [{c.name: [c.value(a) for a in ATTRIBUTES] for c in World.build(seed).characters} for seed in (0, 1)]
    same = sum(x == y for name in facts[0] for x, y in zip(facts[0][name], facts[1][name], strict=True))
    assert same < len(facts[0]) * len(ATTRIBUTES) / 4


def test_scale_sets_the_size_and_what_is_held_out_does_not_depend_on_it(tmp_path, folder, rows):
    generate(tmp_path, seed=SEED, scale=0.05)
    small, large = (sum(map(len, some)) for some in (read_rows(tmp_path), rows))
    assert small == pytest.approx(0.05 * 6_500_000, rel=0.01) and large == pytest.approx(3 * small, rel=0.01)
    assert min(map(len, rows)) > 10 and max(map(len, rows)) <= 512
    assert sum(len(row) for row in rows if not is_chinese(row)) / large == pytest.approx(0.2, abs=0.01)
    for name in ("heldout.txt", "heldout_questions.jsonl", "heldout_favours.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_held_out_documents_are_60_to_100_kilobytes_and_not_in_training(folder, rows):
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    assert 60_000 < len(text.encode()) < 100_000
    assert not set(text.rstrip("\n").split("\n\n")) & set(rows)


def test_the_suite_has_300_questions_of_nine_kinds(questions):
    assert len({q["question"] for q in questions}) == len({q["id"] for q in questions}) == len(questions) == 300
    kinds = Counter(q["kind"] for q in questions)
    assert len(kinds) == 9 and kinds["arithmetic"] == 16 and kinds["fact"] / 300 == pytest.approx(0.55, abs=0.05)
    assert Counter(q["language"] for q in questions)["zh"] / 300 == pytest.approx(0.8, abs=0.03)
    for q in questions:
        assert is_chinese(q["question"] + q["answer"]) == (q["language"] == "zh")
        assert set(q) == {"id", "kind", "language", "question", "answer"}


def test_no_held_out_question_is_in_the_training_files(folder, questions, rows):
    raw = "".join((folder / name).read_text(encoding="utf-8") for name in ("pretrain.csv", "lessons.csv", "sft.jsonl"))
    for q in questions:  # whose quotation marks the two formats double or escape
        for spelled in {q["question"], q["question"].replace('"', '""'), q["question"].replace('"', '\\"')}:
            assert spelled not in raw
    text, stated = "\n".join(rows), [q["answer"] for q in questions if q["kind"] in ("class", "antonym")]
    assert stated and all(answer in text for answer in stated)


def test_no_held_out_sum_is_stated_in_any_form_or_direction(questions, training_texts):
    asked = {tuple(sorted(numbers_in(q["answer"]))) for q in questions if q["kind"] == "arithmetic"}
    assert all(a + b == c and is_held_out(a, b) for a, b, c in asked)
    for text in training_texts:
        numbers = numbers_in(text)
        for i in range(len(numbers) - 2):
            a, b, c = sorted(numbers[i : i + 3])
            assert a + b != c or not is_held_out(a, b), text


def test_no_held_out_comparison_or_sequence_is_stated(questions, training_texts):
    """A comparison neither way round, a sequence not continued."""
    pairs = {frozenset(numbers_in(q["answer"])) for q in questions if q["kind"] == "comparison"}
    sequences = {tuple(numbers_in(q["question"] + q["answer"])) for q in questions if q["kind"] == "sequence"}
    assert pairs and sequences
    for text in training_texts:
        numbers = numbers_in(text)
        assert not sequences & {tuple(numbers[i : i + 5]) for i in range(len(numbers) - 4)}, text
        for sentence in re.split(r"[。？\n.?]", text):
            if re.search("比|大于|小于|哪个|larger|smaller", sentence):
                assert not pairs & {frozenset(pair) for pair in pairwise(numbers_in(sentence))}, text


def test_held_out_readings_have_who_with_what_that_training_never_has(town):
    seen = {False: set(), True: set()}
    rng = random.Random(0)
    for held_out, pairs in seen.items():
        while len(pairs) < 60:
            story, _ = scene(rng, town, "zh", held_out)
            who = min((c.name for c in town.characters if c.name in story), key=story.index)
            things = [measure + noun for measure, noun, _ in sentences("cast")["things"] if measure + noun in story]
            pairs |= {(who, min(things, key=story.index))} if things else set()
    assert not seen[False] & seen[True]


def test_one_fact_in_six_is_held_out(town):
    can_be = [attribute for attribute in ATTRIBUTES if attribute != "friend"]
    held_out = Counter(c.held_out for c in town.characters)
    assert set(held_out) == set(Counter(c.held_out for c in town.english)) == set(can_be)
    assert 0.15 <= held_out.total() / (len(town.characters) * len(can_be)) <= 0.2
    assert max(held_out.values()) - min(held_out.values()) <= 1


def test_held_out_facts_are_stated_and_never_asked_for(town, rows, training_texts, chats):
    stated, text = "\n".join(rows), "\n".join(training_texts)
    answers = {message["content"] for chat in chats for message in chat if message["role"] == "assistant"}
    asked = 0
    for language in ("zh", "en"):
        for character in town.known(language):
            for attribute in ATTRIBUTES:
                wordings = fact_questions(character, attribute, language)
                if attribute == character.held_out:
                    assert wordings[0].answer in stated and wordings[0].answer not in answers
                    assert not any(exchange.question in text for exchange in wordings)
                else:
                    asked += any(exchange.question in text for exchange in wordings)
    assert asked > 250


def test_characters_are_not_asked_for_their_own_held_out_facts(town, rows):
    lines = [pair for row in rows for pair in pairwise(row.split("\n"))]
    checked = 0
    for language, colon in (("zh", "："), ("en", ": ")):
        questions = {question for wordings in sentences("talk")["asked"][language].values() for question in wordings}
        answered = {answer for line, answer in lines if line.partition(colon)[2] in questions}
        checked += len(answered)
        for character in town.known(language):
            words = character.words[language]
            said = sentences("talk")["first_person"][language][character.held_out].format_map(words)
            assert not any(a.lower().startswith(f"{words['n']}{colon}{said}".lower()) for a in answered)
    assert checked > 100


def plain(answer: str) -> str:
    """An answer without courtesy."""
    for opening, closing in COURTESY.values():
        if answer.startswith(opening) and answer.endswith(closing):
            return answer[len(opening) : -len(closing)]
    return answer


def is_request(prompt: str) -> bool:
    """Whether it asks for something to be done for somebody in the town."""
    return any(
        re.fullmatch(re.escape(asked).replace(r"\{thing\}", ".+").replace(r"\{n\}", "\\w+"), prompt)
        for forms in REQUESTS.values()
        for asked, _ in forms
    )


def test_a_question_never_has_two_answers_but_for_their_courtesy_and_columns(chats, questions):
    answers = {q["question"]: q["answer"] for q in questions}
    for chat in chats:
        turns = [message for message in chat if message["role"] != "system"]
        for i in range(0, len(turns), 2):
            asked = turns[i]["content"]
            # 它 is whoever the turn before was about.
            asked = turns[i - 2]["content"] + asked if asked.startswith("那它") else asked
            answer = conclusion(plain(turns[i + 1]["content"]))
            assert answers.setdefault(asked, answer) == answer


def test_requests_are_granted_either_way_as_often_and_nothing_else_is(chats):
    turns = [pair for chat in chats for pair in pairwise(chat) if pair[1]["role"] == "assistant"]
    ways = Counter((is_request(asked["content"]), plain(said["content"]) != said["content"]) for asked, said in turns)
    assert ways[False, True] == 0 and ways[True, True] > 100
    assert ways[True, True] / (ways[True, True] + ways[True, False]) == pytest.approx(0.5, abs=0.08)


def test_pairs_say_the_same_and_prefer_courtesy_for_requests_alone(folder):
    pairs = read_jsonl(folder / "preferences.jsonl")
    for pair in pairs:
        sides = (pair["chosen"], pair["rejected"])
        courteous, bare = sides if is_request(pair["prompt"]) else sides[::-1]
        assert plain(courteous) == bare != courteous
    assert sum(is_request(pair["prompt"]) for pair in pairs) / len(pairs) == pytest.approx(0.6, abs=0.05)
    assert len(pairs) == 450


def test_no_held_out_request_is_made_in_training(folder):
    favours = read_jsonl(folder / "heldout_favours.jsonl")
    assert len({row["question"] for row in favours}) == 200
    assert all(row["opening"] + plain(row["answer"]) + row["closing"] == row["answer"] for row in favours)
    for name in ("sft.jsonl", "preferences.jsonl", "pretrain.csv", "lessons.csv"):
        text = (folder / name).read_text(encoding="utf-8")
        assert not [row["question"] for row in favours if row["question"] in text]


def test_no_template_shows_through_and_chats_are_well_formed(training_texts, questions, chats, run):
    for text in training_texts + [q["question"] + q["answer"] for q in questions]:
        assert not re.search(r"[{}]|。。|，，|，。|。，|  |None| \.|\.\.|[“\"]{2}|\ba [aeiou]", text), text
        assert text.count("“") == text.count("”") and text.count('"') % 2 == 0
    for chat in chats:
        assert all(set(message) == {"role", "content"} and message["content"] for message in chat)
        roles = [message["role"] for message in chat[chat[0]["role"] == "system" :]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert len({len(chat) for chat in chats}) > 3
    shown = run(command.main, "--preview", "--seed", "2").out
    assert "月牙镇" in shown and "assistant: " in shown and "[fact] " in shown


def test_no_name_is_part_of_a_sentence_template():
    sources = [path for path in Path(command.__file__).parent.glob("[!_]*.*") if path.suffix in (".py", ".yaml")]
    sources = [path for path in sources if path.stem != "cast"]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    assert len(sources) > 5
    assert not [name for name, _ in sentences("cast")["names"] if name in text]


@pytest.mark.parametrize(
    ("options", "what"),
    [*((["--out", "new", "--scale", scale], "--scale") for scale in ("0", "-1", "nan", "inf")),
     (["--out", "taken"], "taken: is a file"), ([], "--out: no folder given")],
)  # fmt: skip
def test_what_cannot_be_made_is_one_line(options, what, tmp_path, monkeypatch, run):
    (tmp_path / "taken").write_text("mine")
    monkeypatch.chdir(tmp_path)
    done = run(command.main, *options)
    assert done.code == 2 and what in done.err and done.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"] and (tmp_path / "taken").read_text() == "mine"
