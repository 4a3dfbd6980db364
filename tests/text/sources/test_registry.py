"""Data by name: datasets.yaml, LLaMA-Factory's dataset_info.json, paths, weights, and what is said of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from data_files import write

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

    def written(**entries: object) -> Path:
        (tmp_path / "datasets.yaml").write_text(yaml.safe_dump(entries, allow_unicode=True), encoding="utf8")
        return tmp_path / "datasets.yaml"

    return written


def chat(*texts: str) -> list[dict[str, str]]:
    """Turns of user and assistant."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def refusal(data: str, registry: Path, kind: str = "chat") -> str:
    with pytest.raises(UserError) as caught:
        find_sources(data, registry, kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_brings_its_place_format_columns_and_weight(registry, tmp_path, monkeypatch):
    write(tmp_path / "mine.jsonl", [{"frage": "Q", "antwort": "A"}])
    columns = {"prompt": "frage", "response": "antwort"}
    file = registry(mine={"path": "mine.jsonl", "format": "alpaca", "columns": columns, "weight": 2, "about": "x"},
                    sums={"path": "s.jsonl", "format": "prompt", "columns": columns}, home={"path": "~/a.jsonl"},
                    other={"path": "~nobody/a.jsonl"})  # fmt: skip
    (source,) = find_sources("mine", file)
    assert (source.path, str(source), source.weight) == (str(tmp_path / "mine.jsonl"), "mine", 2)
    assert list(read_conversations(source)) == [chat("Q", "A")]
    (source,) = find_sources("sums", file, "prompt")
    problem = to_problem({"frage": "1+1?", "antwort": "2", "question": "other"}, source.layout)
    assert (problem.question, problem.answer) == ("1+1?", "2")
    monkeypatch.setenv("HOME", "/h")
    paths = [source.path for source in find_sources("home,other", file)]
    assert paths == ["/h/a.jsonl", f"{tmp_path}/~nobody/a.jsonl"]


def test_weights_of_the_command_line_win_and_those_not_given_are_1(registry, tmp_path):
    path = write(tmp_path / "a=3.jsonl", [])
    file = registry(one={"path": "1.jsonl", "weight": 2}, two={"path": "2.jsonl"})
    for data, expected in (
        ("one,two", [2.0, 1.0]), ("one=0.5, two=4", [0.5, 4.0]), ("two,two", None),
        (f"two,{path}", None), (f"two,{path}=7", [1.0, 7.0]),  # a path that exists is not cut at its '='
    ):  # fmt: skip
        assert weights(find_sources(data, file)) == expected


def test_what_is_a_path_and_a_name_is_refused_rather_than_guessed(registry, tmp_path, monkeypatch):
    file = registry(mine={"path": "elsewhere.jsonl"}, **{"b.jsonl": {"path": "elsewhere.jsonl"}})
    monkeypatch.chdir(tmp_path)
    assert find_sources("mine", file)[0].path == str(tmp_path / "elsewhere.jsonl")
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
    found = refusal("mine", file)
    assert "is a path here and a name in" in found and "write ./mine for the path" in found
    for name in ("a,b.jsonl", "b.jsonl"):  # a path with a suffix or a slash is always one
        (tmp_path / name).touch()
    for name in ("./mine", "a,b.jsonl", "b.jsonl", "other"):
        assert find_sources(name, file) == [Source(name)]


def test_a_hub_name_needs_no_entry(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert find_sources("data/chatz", registry()) == [Source("data/chatz")]  # a path that is not there
    given = {"name": "someone/chats:zh", "is_hub": True, "subset": "zh", "weight": 2}
    assert find_sources("someone/chats:zh=2", registry()) == [Source("someone/chats", **given)]
    entry = {"hub": "someone/chats", "subset": "en", "split": "test", "samples": 5, "seed": 1}
    source = Source("someone/chats", "chats", is_hub=True, subset="en", split="test", samples=5, seed=1)
    assert find_sources("chats", registry(chats=entry)) == [source]


def test_a_local_folder_has_splits_and_a_file_has_none(registry, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "a.jsonl").write_text("{}")
    paths = {"folder": ("saved", "test"), "file": ("a.jsonl", "test"), "it": ("a.jsonl", "train")}
    file = registry(**{name: {"path": path, "split": split} for name, (path, split) in paths.items()})
    assert [source.split for source in find_sources("folder,it", file)] == ["test", "train"]
    assert "file: a file has no split; leave it out, or name a folder" in refusal("file", file)
    # Every entry of the project's own registry is right.
    own = Registry.read(ROOT / REGISTRY)
    kinds = {FORMATS[own.source(name).layout.format].kind for name in own.entries}
    assert kinds == {"text", "chat", "preference", "prompt"}


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ({"path": "x.json", "fromat": "alpaca"}, "key 'fromat' is not known; did you mean format?"),
        ({"path": "x.json", "format": "sharegtp"}, "format 'sharegtp' is not known; did you mean sharegpt?"),
        ({"path": "x", "format": "alpaca", "columns": {"promt": "q"}}, "'promt' is not known; did you mean prompt"),
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


def test_names_that_are_nowhere_and_data_of_another_kind(registry, tmp_path):
    pairs = {"path": "no.jsonl", "format": "preference"}
    file = registry(general={"path": "g.json"}, demo_chats={"path": "d.json"}, pairs=pairs)
    assert "--data demo_chat: no such path, and no name in" in refusal("demo_chat", file)
    assert refusal("demo_chat", file).endswith("; did you mean demo_chats?")
    assert refusal("xyz", file).endswith("; known are demo_chats, general, pairs")
    assert refusal("xyz", tmp_path / "no.yaml").endswith("no.yaml, where names are looked up, is not there")
    assert "names nothing" in refusal(" , ", file)
    assert "'zwei' is not a weight; write PATH=NUMBER" in refusal("general=zwei", file)
    assert "with a weight above 0" in refusal("general=0", file)
    assert "its format preference is pairs of answers, and this reads conversations (alpaca" in refusal("pairs", file)
    assert "reads problems with answers (prompt); name other data" in refusal("pairs", file, "prompt")
    assert find_sources("pairs", file, "preference")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("datasets.yaml", b"a: [1\nb: 2\n", ":2: not YAML"),
        ("datasets.yaml", b"- a\n- b\n", "is a list; it must be a table of names"),
        ("datasets.yaml", b"a: \xff\xfe", "cannot be read"),
        ("datasets.yaml", b"#" * (1 << 20) + b"\n", "more than 1,048,576 bytes"),
        ("dataset_info.json", b'{\n"a": {\n', ":3: not JSON"),
    ],
)
def test_a_registry_that_cannot_be_read(name, content, what, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert refusal("mine", tmp_path / name).startswith(f"{tmp_path / name}{what if what[0] == ':' else f': {what}'}")


# LLaMA-Factory's dataset_info.json

SHAREGPT_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "asker", "assistant_tag": "bot"}
TURNS, ALPACA = {"formatting": "sharegpt"}, {"prompt": "q", "query": "more", "response": "r", "system": "sys"}
PAIRS = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
INFO = {
    "alpaca_plain": {"file_name": "alpaca.json"},
    "alpaca_columns": {"file_name": "columns.json", "columns": {**ALPACA, "history": "before"}},
    "glaive": {"file_name": "tools.json", **TURNS, "columns": {"messages": "conversations", "tools": "tools"}},
    "tagged": {"file_name": "tagged.json", **TURNS, "columns": {"messages": "turns"}, "tags": SHAREGPT_TAGS},
    "dpo": {"file_name": "dpo.json", "ranking": True, **TURNS, "columns": PAIRS},
    "dpo_alpaca": {"file_name": "dpo_alpaca.json", "ranking": True, "columns": {"chosen": "good", "rejected": "bad"}},
    "wiki": {"file_name": "wiki.jsonl", "columns": {"prompt": "content"}},
    "ultra": {"hf_hub_url": "someone/ultra", "split": "train_prefs", "ranking": True, "num_samples": 9, "folder": "en"},
    "pictures": {"file_name": "x.json", **TURNS, "columns": {"messages": "m", "images": "i"}},
    "elsewhere": {"ms_hub_url": "someone/else"},
    "misspelt": {"file_nam": "x.json"},
}


@pytest.fixture
def info(tmp_path) -> Path:
    """Its registry with data beside it, in its layouts."""

    def said(who: str, text: str) -> dict[str, str]:
        return {"from": who, "value": text}

    calls = [said("human", "Q"), said("function_call", '{"name": "f"}'), said("observation", "1"), said("gpt", "A")]
    data = {
        "alpaca.json": {"instruction": "Q", "input": "X", "output": "A"},
        "columns.json": {"q": "Q", "more": "X", "r": "A", "sys": "S", "before": [["B", "C"]]},
        "tools.json": {"conversations": calls, "tools": "[T]"},
        "tagged.json": {"turns": [{"role": "asker", "content": "Q"}, {"role": "bot", "content": "A"}]},
        "dpo.json": {"conversations": calls[:1], "chosen": said("gpt", "A"), "rejected": said("gpt", "B")},
        "dpo_alpaca.json": {"instruction": "Q", "input": "X", "good": "A", "bad": "B"},
    }
    for name, row in data.items():
        (tmp_path / name).write_text(json.dumps([row], ensure_ascii=False), encoding="utf8")
    write(tmp_path / "wiki.jsonl", [{"content": "Words."}])
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
