"""Data by name: datasets.yaml, LLaMA-Factory's dataset_info.json, paths, weights, and what is said of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from errors import UserError
from text.chats.conversations import read_conversations
from text.chats.preferences import Preference, read_preferences
from text.chats.problems import to_problem
from text.corpus.corpus import Corpus
from text.sources.formats import FORMATS
from text.sources.registry import REGISTRY, Registry, Source, find_sources, weights

ROOT = Path(__file__).parents[3]


@pytest.fixture
def registry(tmp_path):
    """`registry(**entries)`: a datasets.yaml with them."""

    def write(**entries: object) -> Path:
        path = tmp_path / "datasets.yaml"
        path.write_text(yaml.safe_dump(entries, allow_unicode=True), encoding="utf8")
        return path

    return write


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")
    return path


def chat(*texts: str) -> list[dict[str, str]]:
    """Turns of user and assistant."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def refusal(data: str, registry: Path, kind: str = "chat") -> str:
    with pytest.raises(UserError) as caught:
        find_sources(data, registry, kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_brings_its_place_format_columns_and_weight(registry, tmp_path):
    lines(tmp_path / "mine.jsonl", {"frage": "Q", "antwort": "A"})
    columns = {"prompt": "frage", "response": "antwort"}
    file = registry(mine={"path": "mine.jsonl", "format": "alpaca", "columns": columns, "weight": 2, "about": "x"})
    (source,) = find_sources("mine", file)
    assert (source.path, str(source), source.weight) == (str(tmp_path / "mine.jsonl"), "mine", 2)
    assert list(read_conversations(source)) == [chat("Q", "A")]


def test_weights_of_the_command_line_win_and_those_not_said_are_1(registry, tmp_path):
    path = lines(tmp_path / "a=3.jsonl")
    file = registry(one={"path": "1.jsonl", "weight": 2}, two={"path": "2.jsonl"})
    assert weights(find_sources("one,two", file)) == [2.0, 1.0]
    assert weights(find_sources("one=0.5, two=4", file)) == [0.5, 4.0]
    assert weights(find_sources("two,two", file)) is None
    assert weights(find_sources(f"two,{path}", file)) is None  # a path that exists is not cut at its '='
    assert weights(find_sources(f"two,{path}=7", file)) == [1.0, 7.0]


def test_what_is_a_path_and_a_name_is_refused_rather_than_guessed(registry, tmp_path, monkeypatch):
    file = registry(mine={"path": "elsewhere.jsonl"}, **{"b.jsonl": {"path": "elsewhere.jsonl"}})
    monkeypatch.chdir(tmp_path)
    assert find_sources("mine", file)[0].path == str(tmp_path / "elsewhere.jsonl")
    (tmp_path / "mine").mkdir()
    assert "is a path here and a name in" in refusal("mine", file) and "write ./mine for the path" in refusal(
        "mine", file
    )
    assert find_sources("./mine", file) == [Source("./mine")]
    for name in ("a,b.jsonl", "b.jsonl"):  # a path with a suffix or a slash is always one
        (tmp_path / name).touch()
        assert find_sources(name, file) == [Source(name)]
    (tmp_path / "other").mkdir()
    assert find_sources("other", file) == [Source("other")]


def test_a_hub_name_needs_no_entry(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert find_sources("data/chatz", registry()) == [Source("data/chatz")]  # a path that is not there
    (source,) = find_sources("someone/chats:zh=2", registry())
    assert (source.path, source.subset, source.split, source.is_hub) == ("someone/chats", "zh", "train", True)
    entry = {"hub": "someone/chats", "subset": "en", "split": "test", "samples": 5, "seed": 1}
    (source,) = find_sources("chats", registry(chats=entry))
    assert (source.path, source.subset, source.split, source.samples, source.seed) == (
        "someone/chats", "en", "test", 5, 1
    )  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"path": "x.json", "fromat": "alpaca"}, "key 'fromat' is not known; did you mean format?"),
        ({"path": "x.json", "format": "sharegtp"}, "format 'sharegtp' is not known; did you mean sharegpt?"),
        (
            {"path": "x.json", "format": "alpaca", "columns": {"promt": "q"}},
            "'promt' is not known; did you mean prompt",
        ),
        ({"path": "x.json", "format": "alpaca", "columns": {"chosen": "q"}}, "'chosen' is not known; known are prompt"),
        ({"path": "x.json", "columns": {"prompt": "q"}}, "columns say nothing without a format; give one of text"),
        ({"path": "x.json", "format": "alpaca", "columns": {"prompt": ["q"]}}, "columns must name one thing each"),
        ({"path": "x.json", "tags": {"usertag": "q"}}, "tag 'usertag' is not known; did you mean user_tag?"),
        ({"path": "x.json", "hub": "a/b"}, "give either path"),
        ({"format": "alpaca"}, "give either path"),
        ({"path": 3}, "path must be text"),
        ({"path": "x.json", "subset": "zh"}, "subset and folder are for data on the Hub"),
        ({"path": "x.json", "samples": 0}, "samples 0; give a whole number above 0"),
        ({"path": "x.json", "samples": 2.5}, "samples 2.5; give a whole number"),
        ({"path": "x.json", "weight": -1}, "weight -1; give a number above 0"),
        ({"path": "x.json", "weight": True}, "weight True; give a number above 0"),
        ("x.json", "must have keys such as path and format"),
    ],
)
def test_a_mistake_in_an_entry_is_one_line_with_a_remedy(entry, what, registry):
    file = registry(mine=entry, other={"path": "fine.json"})
    message = refusal("mine", file)
    assert message.startswith(f"{file}: mine: ") and what in message
    assert find_sources("other", file)  # an entry is checked when it is asked for


def test_names_that_are_nowhere(registry, tmp_path):
    file = registry(general={"path": "g.json"}, demo_chats={"path": "d.json"})
    assert "--data demo_chat: no such path, and no name in" in refusal("demo_chat", file)
    assert refusal("demo_chat", file).endswith("; did you mean demo_chats?")
    assert refusal("xyz", file).endswith("; known are demo_chats, general")
    assert refusal("xyz", tmp_path / "no.yaml").endswith("no.yaml, where names are looked up, is not there")
    assert "names nothing" in refusal(" , ", file)
    assert "'zwei' is not a weight; write PATH=NUMBER" in refusal("general=zwei", file)
    assert "with a weight above 0" in refusal("general=0", file)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"a: [1\nb: 2\n", ":2: not YAML"),
        (b"- a\n- b\n", "is a list; it must be a table of names"),
        (b"a: \xff\xfe", "cannot be read"),
    ],
)
def test_a_registry_that_is_none(content, what, tmp_path):
    (tmp_path / "datasets.yaml").write_bytes(content)
    message = refusal("mine", tmp_path / "datasets.yaml")
    assert message.startswith(str(tmp_path / "datasets.yaml")) and what in message


def test_data_of_another_kind_is_refused_before_it_is_read(registry):
    file = registry(pairs={"path": "no.jsonl", "format": "preference"}, words={"path": "t.csv", "format": "text"})
    assert "its format preference is pairs of answers, and this reads conversations (alpaca" in refusal("pairs", file)
    assert "reads problems with answers (prompt); name other data" in refusal("words", file, "prompt")
    assert find_sources("pairs", file, "preference") and find_sources("words", file, "text")


def test_every_entry_of_the_project_s_own_registry_is_right():
    registry = Registry.read(ROOT / REGISTRY)
    kinds = {FORMATS[registry.source(name).layout.format].kind for name in registry.entries}
    assert kinds == {"text", "chat", "preference", "prompt"}


# LLaMA-Factory's dataset_info.json

SHAREGPT_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "asker", "assistant_tag": "bot"}
INFO = {
    "alpaca_plain": {"file_name": "alpaca.json"},
    "alpaca_columns": {
        "file_name": "columns.json",
        "columns": {"prompt": "q", "query": "more", "response": "r", "system": "sys", "history": "before"},
    },
    "glaive": {
        "file_name": "tools.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "tools"},
    },
    "tagged": {
        "file_name": "tagged.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns"},
        "tags": SHAREGPT_TAGS,
    },
    "dpo": {
        "file_name": "dpo.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "dpo_alpaca": {"file_name": "dpo_alpaca.json", "ranking": True, "columns": {"chosen": "good", "rejected": "bad"}},
    "wiki": {"file_name": "wiki.jsonl", "columns": {"prompt": "content"}},
    "ultra": {"hf_hub_url": "someone/ultra", "split": "train_prefs", "ranking": True, "num_samples": 9, "folder": "en"},
    "pictures": {"file_name": "x.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}},
    "elsewhere": {"ms_hub_url": "someone/else"},
    "misspelt": {"file_nam": "x.json"},
}


@pytest.fixture
def info(tmp_path) -> Path:
    """Its registry with data beside it, in its layouts."""
    data = {
        "alpaca.json": {"instruction": "Q", "input": "X", "output": "A"},
        "columns.json": {"q": "Q", "more": "X", "r": "A", "sys": "S", "before": [["B", "C"]]},
        "tools.json": {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": '{"name": "f"}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "A"},
            ],
            "tools": "[T]",
        },
        "tagged.json": {"turns": [{"role": "asker", "content": "Q"}, {"role": "bot", "content": "A"}]},
        "dpo.json": {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "A"},
            "rejected": {"from": "gpt", "value": "B"},
        },
        "dpo_alpaca.json": {"instruction": "Q", "input": "X", "good": "A", "bad": "B"},
    }
    for name, row in data.items():
        (tmp_path / name).write_text(json.dumps([row], ensure_ascii=False), encoding="utf8")
    lines(tmp_path / "wiki.jsonl", {"content": "Words."})
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO), encoding="utf8")
    return tmp_path / "dataset_info.json"


def test_llama_factory_s_registry_is_read_as_it_stands(info):
    def read(name: str) -> list:
        (messages,) = read_conversations(*find_sources(name, info), on_error="stop")
        return messages

    assert read("alpaca_plain") == chat("Q\nX", "A")
    assert read("alpaca_columns") == [{"role": "system", "content": "S"}, *chat("B", "C", "Q\nX", "A")]
    assert [(turn["role"], turn["content"]) for turn in read("glaive")] == [
        ("system", "[T]"), ("user", "Q"), ("assistant", '{"name": "f"}'), ("tool", "1"), ("assistant", "A")
    ]  # fmt: skip
    assert read("tagged") == chat("Q", "A")
    for name, question in (("dpo", "Q"), ("dpo_alpaca", "Q\nX")):
        (pair,) = read_preferences(*find_sources(name, info, "preference"), on_error="stop")
        assert pair == Preference(chat(question, "A"), chat(question, "B"))
    assert [document.text for document in Corpus(find_sources("wiki", info, "text"))] == ["Words."]
    (source,) = find_sources("ultra", info, "preference")
    assert (source.path, source.is_hub, source.split, source.samples, source.folder) == (
        "someone/ultra", True, "train_prefs", 9, "en"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pictures", "has images, which no stage of this project reads"),
        ("elsewhere", "has neither hf_hub_url nor file_name; download the data"),
        ("misspelt", "key 'file_nam' is not known; did you mean file_name?"),
        ("glaiv", "no such path, and no name in"),
    ],
)
def test_what_of_it_cannot_be_read_is_said(name, what, info):
    assert what in refusal(name, info)


def test_a_broken_json_registry_has_its_line(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{\n"a": {\n')
    assert ":3: not JSON" in refusal("a", tmp_path / "dataset_info.json")


def test_columns_of_problems_can_be_named(registry, tmp_path):
    columns = {"prompt": "aufgabe", "response": "loesung"}
    file = registry(sums={"path": "s.jsonl", "format": "prompt", "columns": columns})
    (source,) = find_sources("sums", file, "prompt")
    problem = to_problem({"aufgabe": "1+1?", "loesung": "2", "question": "other"}, source.layout)
    assert (problem.question, problem.answer) == ("1+1?", "2")


def test_the_path_of_an_entry_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "names.yaml").write_text("mine: {path: ~/data/a.jsonl}\nother: {path: ~nobody/a.jsonl}\n")
    sources = find_sources("mine,other", tmp_path / "names.yaml")
    assert [source.path for source in sources] == [f"{tmp_path}/data/a.jsonl", f"{tmp_path}/~nobody/a.jsonl"]


def test_a_local_folder_has_splits_and_a_file_has_none(registry, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "a.jsonl").write_text("{}")
    names = tmp_path / "names.yaml"
    names.write_text(
        "folder: {path: saved, split: test}\nfile: {path: a.jsonl, split: test}\nit: {path: a.jsonl, split: train}"
    )
    assert [source.split for source in find_sources("folder,it", names)] == ["test", "train"]
    with pytest.raises(UserError, match=r"names.yaml: file: a file has no split; leave it out, or name a folder"):
        find_sources("file", names)
