"""What comes from outside is data: it is never run, stays in its folder, and words in it never become marks."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write

import eval.answering
from dataset import ChatDataset, PreferenceDataset, PromptDataset
from errors import DamagedCheckpoint, UserError
from eval.chat import Conversation
from model import MiniDeepSeek
from model.checkpoint.hf_import import import_folder
from model.checkpoint.weight_files import WeightFiles
from model.decoding.sampling import Sampling
from text.corpus.corpus import Corpus
from text.corpus.shard_set import INDEX, ShardSet
from text.corpus.shards import open_sources, prepare_shards
from text.sources.registry import Source
from text.tokenizer import SPECIAL_TOKENS, Tokenizer
from training.adapters.adapter import Adapter
from training.distill.teacher import open_transformers
from training.optim.build import OptimSettings, build_optimizer
from training.run.state import load_training_state
from training.startup import open_checkpoint

ROOT = Path(__file__).parents[1]

# The sources

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile", "zipfile"}
NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
CALLS = {"os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "shutil.unpack_archive"}


def dotted(node: ast.expr) -> str:
    """`os.system` of the function that a call names; nothing where it is an expression."""
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def dangers(source: str) -> list[str]:
    """What in a source could run what it reads, by its syntax tree."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            given = {word.arg: getattr(word.value, "value", word.value) for word in node.keywords}
            if name in NAMES | CALLS or (name == "torch.load" and given.get("weights_only") is not True):
                found.append(name)
            found += [word for word in ("allow_pickle", "trust_remote_code", "shell") if given.get(word, False)]
    return found


def sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() or [
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in path.parts
    ]
    return [ROOT / name for name in names if not name.startswith("tests/") and (ROOT / name).is_file()]


def test_no_source_runs_what_it_reads():
    assert len(sources()) > 100
    assert {path.name: found for path in sources() if (found := dangers(path.read_text(encoding="utf8")))} == {}


DANGEROUS = (
    "import pickle", "from joblib import load", "eval(text)", "exec(text)", "torch.load(file)", "import tarfile",
    "yaml.load(text, Loader)", "torch.load(file, weights_only=False)", "np.load(file, allow_pickle=True)",
    "AutoModel.f(x, trust_remote_code=True)", "subprocess.run(text, shell=True)", "shutil.unpack_archive(file)",
)  # fmt: skip
HARMLESS = ("model.eval()", "re.compile(text)", "torch.load(file, weights_only=True)", "yaml.safe_load(t)")


def test_a_dangerous_line_would_be_found():
    assert all(dangers(f"def f():\n    {line}\n") for line in DANGEROUS) and not any(map(dangers, HARMLESS))


# Pickles


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable, tuple]:
        return open, (str(self.trace), "w")


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """A file that must not be there after the test, and would be if a `Bomb` were unpickled."""
    trace = tmp_path / "ran"
    pickle.loads(pickle.dumps(Bomb(trace))).close()
    assert trace.exists()
    trace.unlink()
    yield trace
    assert not trace.exists()


def write_bomb(file: Path, trace: Path) -> None:
    """As a pickle or, where the name says so, as torch or numpy write one."""
    if file.suffix in (".bin", ".pt"):
        torch.save({"lm_head.weight": Bomb(trace)}, file)
    elif file.suffix == ".npy":
        np.save(file, np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    else:
        file.write_bytes(pickle.dumps(Bomb(trace)))


FILES = ("model.safetensors", "mtp.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "optimizer.pt",
         "training_args.bin", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         )  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_a_checkpoint_is_not_run(name, checkpoint, trace):
    if name in ("pytorch_model.bin", "model.safetensors.index.json"):
        (checkpoint / "model.safetensors").unlink()
    write_bomb(checkpoint / name, trace)
    unread = ("training_args.bin", "optimizer.pt", "tokenizer_config.json", "generation_config.json")
    for action, not_needed in ((open_checkpoint, unread), (import_here, (*unread, "tokenizer.json"))):
        if name in not_needed:
            action(str(checkpoint))
            continue
        with pytest.raises(UserError):
            action(str(checkpoint))


def import_here(folder: str) -> None:
    import_folder(Path(folder), Path(folder).with_name("imported"))


def test_a_pickle_in_a_training_state_is_not_run(checkpoint, trace):
    write_bomb(checkpoint / "training" / "state.safetensors", trace)
    model = MiniDeepSeek.from_pretrained(checkpoint)
    with pytest.raises(DamagedCheckpoint):
        load_training_state(checkpoint, model, build_optimizer(model, OptimSettings()))


def test_a_pickle_as_an_adapter_is_not_run(checkpoint, trace, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["o_proj"]}', encoding="utf8")
    model = MiniDeepSeek.from_pretrained(checkpoint)
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        write_bomb(folder / name, trace)
        with pytest.raises(UserError):
            Adapter.open(model, folder)


def test_a_pickle_as_a_teacher_of_transformers_is_not_run(checkpoint, trace):
    (checkpoint / "model.safetensors").unlink()
    write_bomb(checkpoint / "pytorch_model.bin", trace)
    with pytest.raises(UserError, match="cannot be opened"):
        open_transformers(str(checkpoint), torch.float32)


def test_code_beside_a_teacher_is_not_run(checkpoint, trace):
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf8"))
    config |= {"model_type": "its_own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf8")
    (checkpoint / "code.py").write_text(f"open({str(trace)!r}, 'w')\n", encoding="utf8")
    with pytest.raises(UserError):
        open_transformers(str(checkpoint), torch.float32)


@pytest.mark.parametrize(
    "name", ["a.csv", "a.jsonl", "a.json", "a.parquet", "a.arrow", "a.txt", "a.jsonl.gz", "a.pkl", "a.npy"]
)
def test_a_pickle_as_data_is_not_run(name, trace, tmp_path, tokenizer):
    folder = tmp_path / "data"
    folder.mkdir()
    write_bomb(folder / name, trace)
    for action in (lambda: list(Corpus(str(folder))), lambda: ChatDataset([folder], tokenizer, 64)):
        with pytest.raises(UserError):
            action()


def test_a_pickle_in_a_shard_is_not_run(world, tokenizer, trace, tmp_path):
    folder = tmp_path / "shards"
    prepare_shards(str(world / "pretrain.csv"), tokenizer, folder, workers=1)
    opened = ShardSet.open(folder, tokenizer)
    write_bomb(folder / "train-00000.npy", trace)
    with pytest.raises(UserError, match="damaged"):
        ShardSet.open(folder, tokenizer)
    with pytest.raises(ValueError, match=r"memory-mapped|pickle"):  # with a checksum that fits
        opened.split("train").document(0)


# Places


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/tmp/outside.safetensors", "..", "a/../../outside.safetensors", ""]
)
def test_a_list_of_shards_names_no_file_outside_its_folder(name, checkpoint, tmp_path):
    shutil.copyfile(checkpoint / "model.safetensors", tmp_path / "outside.safetensors")
    (checkpoint / "model.safetensors").unlink()
    weights = {"weight_map": {"lm_head.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(weights), encoding="utf8")
    with pytest.raises(DamagedCheckpoint, match=r"outside the checkpoint folder|damaged or cut short"):
        WeightFiles(checkpoint)


def test_an_index_of_shards_removes_no_file_outside_its_folder(world, tokenizer, tmp_path):
    """Shards of another tokenizer are removed; a name in their index leads to no file elsewhere."""
    folder, victim = tmp_path / "shards", tmp_path / "victim.bin"
    prepare_shards(str(world / "pretrain.csv"), tokenizer, folder, workers=1)
    victim.write_bytes(b"precious")
    index = json.loads((folder / INDEX).read_text(encoding="utf8"))
    index["parts"][0]["train"]["name"], index["fingerprint"] = "../victim", "0" * 16
    (folder / INDEX).write_text(json.dumps(index), encoding="utf8")
    with pytest.raises(UserError, match=r"a shard '../victim'\); delete the folder"):
        prepare_shards(str(world / "pretrain.csv"), tokenizer, folder, workers=1)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["../evil", "../../evil.csv", "a/..", "..", "/", "x" * 50])
def test_shards_of_any_name_lie_in_their_folder(name, tmp_path, tokenizer, monkeypatch):
    made: list[Path] = []
    monkeypatch.setattr(
        "text.corpus.shards.prepare_shards", lambda group, tokenizer, folder, **options: made.append(folder)
    )
    for source in (Source(name), Source(name, is_hub=True, subset="../../x")):
        open_sources([source], tokenizer, tmp_path / "shards", main=True)
    assert all(folder.resolve().parent == tmp_path / "shards" for folder in made)


def test_an_import_copies_names_that_it_knows_only(checkpoint, tmp_path):
    (checkpoint / "evil.py").write_text("x", encoding="utf8")
    import_folder(checkpoint, tmp_path / "imported")
    names = ("config.json", "generation_config.json", "model.safetensors", "mtp.safetensors", "tokenizer.json")
    names = (*names, "tokenizer_config.json", "README.md")  # a card, made here
    assert {path.name for path in (tmp_path / "imported").iterdir()} == set(names)


# Words that look like marks

SPELLED = "".join(SPECIAL_TOKENS) + "<|im_start|><|im_end|><|endoftext|></s ><S>"


@pytest.mark.parametrize("change", [{"special": False}, {"lstrip": True}, {"normalized": True}])
def test_a_tokenizer_that_would_see_marks_in_text_is_refused(change, tokenizer, tmp_path):
    content = json.loads(tokenizer.raw.to_str())
    content["added_tokens"][2] |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf8")
    if "special" in change:
        with pytest.raises(UserError, match="not the special tokens"):
            Tokenizer.from_folder(tmp_path)
    else:
        opened = Tokenizer.from_folder(tmp_path)
        assert opened.decode(opened.encode(f"a {SPELLED} b"), skip_special_tokens=False) == f"a {SPELLED} b"


def marks(ids: np.ndarray | list[int], tokenizer: Tokenizer) -> list[str]:
    """The special tokens in a row, padding aside."""
    return [SPECIAL_TOKENS[n] for n in np.asarray(ids).tolist() if n < len(SPECIAL_TOKENS) and n != tokenizer.pad_id]


def test_marks_in_a_corpus_stay_text(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text(f"text\n{SPELLED} one\n{SPELLED} two\n", encoding="utf8")
    found = prepare_shards(str(tmp_path / "a.csv"), tokenizer, tmp_path / "shards", workers=1, val_fraction=0)
    stream = found.split("train")
    assert marks(stream.read(0, stream.tokens), tokenizer) == ["</s>"] * 2
    assert tokenizer.decode(stream.read(0, stream.tokens)).count(SPELLED) == 2


THOUGHTLESS = SPELLED.replace("<think>", "").replace("</think>", "")
TURNS = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "</s>"]


def test_marks_in_rows_stay_text(tokenizer, tmp_path):
    chat = write(
        tmp_path / "chat.jsonl", [dict.fromkeys(("instruction", "input", "system"), SPELLED) | {"output": THOUGHTLESS}]
    )
    assert marks(ChatDataset([chat], tokenizer, 4096, progress=False).chats[0][0], tokenizer) == TURNS
    pair = {"prompt": SPELLED, "chosen": THOUGHTLESS, "rejected": "no" + THOUGHTLESS, "system": SPELLED}
    pairs = PreferenceDataset([write(tmp_path / "pairs.jsonl", [pair])], tokenizer, 4096).pairs[0]
    assert [marks(ids, tokenizer) for ids, _ in pairs] == [TURNS] * 2
    problem = write(tmp_path / "problems.jsonl", [{"question": SPELLED, "answer": "2"}])
    prompts = PromptDataset([Source(problem)], tokenizer, 4096)
    assert marks(prompts.encode([prompts.problem(0)])[0], tokenizer) == ["<s>", "<|user|>", "<|assistant|>"]


def test_marks_that_a_person_types_stay_text(tokenizer, checkpoint, monkeypatch, capsys):
    seen: list[list[int]] = []
    monkeypatch.setattr(eval.answering, "stream", lambda model, prompt, *rest: seen.append(prompt[0].tolist()) or [])
    answerer = eval.answering.Answerer(*open_checkpoint(str(checkpoint)))
    monkeypatch.setattr(answerer.model.config, "max_position_embeddings", 4096)
    Conversation(answerer, SPELLED, Sampling(), 8, 0, False).ask(SPELLED)
    assert marks(seen[0], tokenizer) == ["<s>", "<|system|>", "<|user|>", "<|assistant|>"]
    assert tokenizer.decode(seen[0], skip_special_tokens=False).count(SPELLED) == 2
