"""Models and tasks for lm-evaluation-harness (`lm-eval`), which asks and counts; installed on demand."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm

from errors import UserError, quiet_imports
from eval.answering import Answerer
from eval.likelihood import CacheScorer, Pair, Scored, rolling
from eval.model_path import ModelPath
from eval.scores import Item, Measured, score_items
from eval.tasks.docs import Docs
from eval.tasks.opened import FOLDER, Task
from eval.tasks.replies import as_text, first_answer, replies_of
from model.decoding.sampling import GREEDY, Sampling
from text.chats.chat_template import Message
from training.machine import DTYPES

LOGITS = 2**28  # numbers at once, of other models


class Measurable:
    """What models have in common: texts scored in windows that overlap. Attributes: see `eval.tasks.texts.Text`."""

    window, stride, start = 1024, 512, "eos"
    chats = True  # whether it has a chat template
    cut = 0  # contexts that lost their beginning, as far as is known

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text after a start token."""
        found = []
        window = min(self.window, self.max_length)
        for (text,) in tqdm([request.args for request in requests], disable=None, desc="texts"):
            line = [self.start_id, *self.tok_encode(text, add_special_tokens=False)]
            found.append(sum(self.score_windows(list(rolling(line, window, min(self.stride, window))))))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found


class CacheLM(Measurable, LM):
    """A checkpoint of this project, measured from its latent cache."""

    def __init__(self, answerer: Answerer) -> None:
        super().__init__()
        self.scorer = CacheScorer(answerer)
        self.score_windows = self.scorer.score_windows
        self.render = self.apply_chat_template = self.scorer.render

    start_id = property(lambda self: getattr(self.scorer.answerer.tokenizer, f"{self.start}_id"))
    max_length = property(lambda self: self.scorer.context)
    cut = property(lambda self: self.scorer.cut)
    tokenizer_name = "mini-deepseek-v3"

    def tok_encode(self, text: str, **_: Any) -> list[int]:
        return self.scorer.encode(text)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Scored]:
        found: list[Scored] = [(0.0, False)] * len(requests)
        pairs = [self.scorer.encode_pair(*request.args) for request in requests]
        for place, score in tqdm(self.scorer.score_pairs(pairs), total=len(pairs), disable=None, desc="choices"):
            found[place] = score
            self.cache_hook.add_partial("loglikelihood", requests[place].args, score)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(place)
        for places in by_settings.values():
            given, sampling = requests[places[0]].args[1], GREEDY
            if given.get("do_sample"):
                sampling = Sampling(1.0, given.get("temperature", 1.0), given.get("top_k", 0), given.get("top_p", 1.0))
            until = given.get("until") or []
            made = self.scorer.answers(
                [self.scorer.encode(requests[place].args[0]) for place in places],
                given.get("max_gen_toks", 256), sampling, [until] if isinstance(until, str) else until,
            )  # fmt: skip
            for number, answer in tqdm(made, total=len(places), disable=None, desc="answers"):
                answers[places[number]] = answer
                self.cache_hook.add_partial("generate_until", requests[places[number]].args, answer)
        return answers


class OtherLM(Measurable, HFLM):
    """Any causal language model that transformers opens, through lm-evaluation-harness's own class."""

    start_id = property(lambda self: self.eot_token_id if self.start == "eos" else self.prefix_token_id)
    chats = property(lambda self: bool(self.tokenizer.chat_template))

    def render(self, messages: Sequence[Message]) -> str:
        """Return a conversation in the model's chat template; as questions and answers where it has none."""
        return self.apply_chat_template(list(messages)) if self.chats else as_text(messages)

    def score_windows(self, windows: Sequence[Pair]) -> list[float]:
        return [nats for nats, _ in self._loglikelihood_tokens([(("", ""), *pair) for pair in windows], True)]

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
        # Marks such as <think> are part of an answer, and special tokens to some tokenizers.
        return super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)


def open_lm(place: ModelPath, device: torch.device, dtype: torch.dtype) -> CacheLM | OtherLM:
    """Open a model to be measured. Raises `UserError` where transformers is needed and does not open it."""
    if place.is_own:
        return CacheLM(Answerer.open(str(place.folder), str(device.type), name_of(dtype)))
    given = {"gguf_file": place.gguf} if place.gguf else {}
    try:
        with quiet_imports():  # transformers imports torchao here
            lm = OtherLM(str(place.folder), device=device.type, dtype=dtype, **given)
    except Exception as error:  # transformers and safetensors raise of every kind
        what = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        remedy = "pip install -r requirements-dev.txt" if isinstance(error, ImportError) else "give another folder"
        raise UserError(f"{place}: transformers does not open it ({what}); {remedy}") from None
    if lm.tokenizer.eos_token_id is None:
        raise UserError(f"{place}: its tokenizer has no end token; name one in tokenizer_config.json")
    vocabulary = lm.config.get_text_config().vocab_size
    lm.batch_size_per_gpu = max(min(LOGITS // (lm.max_length * vocabulary), 64), 1)
    return lm


def name_of(dtype: torch.dtype) -> str:
    """Return the name that --dtype gives a type."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def measure(
    task: Task, docs: Docs, lm: CacheLM | OtherLM, weights: dict[str, Any], out: Path,
    limit: int = 0, shots: int | None = None, chat: bool = False,
) -> Measured:  # fmt: skip
    """Measure a task; what `out` holds of it already, under these weights, is not asked again.

    Args:
        docs: of a task of this project; empty for one of lm-evaluation-harness's own, to which what follows applies.
        weights: what identifies the model.
        limit: items, 0 for all. shots: worked questions, None for the task's own number. chat: ask in the model's
            chat template.

    Raises `UserError` for a task that cannot be loaded.
    """
    start, cut = time.perf_counter(), lm.cut
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if task.settings:
        settings, given = {"kind": task.kind, **asdict(task.settings)}, {}
        loaded = [_ours(task, docs, lm)]
    else:
        settings = {"kind": "lm-eval", "task": task.name, "limit": limit, "shots": shots, "chat": chat}
        given = {"limit": limit or None, "num_fewshot": shots, "apply_chat_template": chat}
        loaded = _theirs(task.name)
    windows = settings if task.kind == "text" else {"window": 1024, "stride": 512, "start": "eos"}
    lm.window, lm.stride, lm.start = windows["window"], windows["stride"], windows["start"]
    found = simple_evaluate(
        lm,
        tasks=loaded,
        task_manager=TaskManager(include_defaults=False),
        use_cache=str(_cache(out, {**weights, "windows": [lm.window, lm.stride, lm.start]})),
        bootstrap_iters=0,
        **given,
    )
    items, content = [], hashlib.sha256()
    for name, samples in found["samples"].items():
        items += _items("" if task.settings else name, samples, found["configs"][name]["output_type"], lm)
        for sample in samples:
            doc = {key: value for key, value in sample["doc"].items() if key != "problem"}
            content.update(json.dumps(doc, sort_keys=True, default=str).encode())
    results = {**found["results"], **found.get("groups", {})}
    totals = results.get(task.name) or (next(iter(results.values())) if len(results) == 1 else {})
    totals = {_metric(*name.split(",")): value for name, value in totals.items() if "," in name}
    scores = score_items(items, totals, bootstrap=task.kind == "quality")
    seconds = time.perf_counter() - start
    return Measured(task.name, settings, scores, len(items), lm.cut - cut, seconds, content.hexdigest()[:16])


def _ours(task: Task, docs: Docs, lm: CacheLM | OtherLM) -> ConfigurableTask:
    """Make a task of this project from documents that were checked; chats in the model's own template."""
    config = {**load_yaml(FOLDER / f"_{task.kind}.yaml"), **task.settings.keys(), "task": task.name}
    config["custom_dataset"] = lambda **_: {"test": docs}
    if "turns" in docs[0]:
        config["doc_to_text"] = lambda doc: lm.render(doc["turns"])
        judge = config.get("process_results")
        if judge and not lm.chats:
            config["process_results"] = lambda doc, results: judge(doc, [list(map(first_answer, replies_of(results)))])
    return ConfigurableTask(config=config)


def _theirs(name: str) -> list[Any]:
    """Load a task or group of lm-evaluation-harness. Raises `UserError` if it is unknown or has no data."""
    manager = TaskManager()
    if name not in manager.all_tasks and not Path(name).is_file():
        ours = [path.stem for path in FOLDER.glob("[!_]*.yaml")]
        near = difflib.get_close_matches(name, [*ours, *manager.all_tasks], n=1)
        hint = f"did you mean {near[0]}?" if near else "python -m lm_eval ls tasks shows its names"
        raise UserError(f"--tasks {name}: neither a task of this project nor one of lm-eval; {hint}")
    try:
        loaded = manager.load([name])
    except Exception as error:  # the Hub's client and lm-eval raise of every kind
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--tasks {name}: lm-eval does not load it ({what}); check the network, or name your data"
        ) from None
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def _items(name: str, samples: Sequence[dict[str, Any]], kind: str, lm: CacheLM | OtherLM) -> Iterator[Item]:
    """Yield what was measured of each document, by all filters. name: of their group; empty: each has one."""
    items: dict[int, Item] = {}
    for sample in samples:
        item = items.setdefault(sample["doc_id"], Item(name or sample["doc"]["group"]))
        item.values |= {_metric(metric, sample["filter"]): sample[metric] for metric in sample["metrics"]}
        if kind == "multiple_choice":
            item.chance = 1 / len(sample["arguments"])
        if kind == "loglikelihood_rolling":
            tokens = lm.tok_encode(sample["arguments"][0][0], add_special_tokens=False)
            item.values["perplexity"] = (sample["filtered_resps"][0], len(tokens))
    yield from items.values()


def _metric(metric: str, answer_filter: str) -> str:
    return metric if answer_filter == "none" else f"{metric} ({answer_filter})"


def _cache(out: Path, facts: dict[str, Any]) -> Path:
    """Where lm-evaluation-harness keeps its answers, without the end that it adds. A damaged file is deleted."""
    path = out / "answers" / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    file = path.with_name(f"{path.name}_rank0.db")
    if file.is_file():
        with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(file)) as found:
            if found.execute("PRAGMA quick_check").fetchone() == ("ok",):
                return path
        file.unlink()
        print(f"notice: {file}: damaged; measured again")
    return path
