"""Suites measure what they say: by hand on small models, on replies that are made up, and chance without skill."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from errors import UserError
from eval.opened_model import OpenedModel, open_model
from eval.own_model import OwnModel
from eval.peer_model import PeerModel
from eval.perplexity import score_text
from eval.questions import accuracy, ask, read_questions
from eval.suites.choice_rows import ChoiceItem
from eval.suites.exact_match import ExactMatch
from eval.suites.multiple_choice import Asked, MultipleChoice, encode_pairs
from eval.suites.quality import Quality, chinese_share, distinct, repetition
from eval.suites.replies import Questions, Style
from eval.suites.suite import Score
from eval.suites.text_likelihood import TextLikelihood, rolling
from text.chat_template import Message


@pytest.fixture(scope="module")
def own(pretrained) -> OpenedModel:
    return open_model(str(pretrained / "final"), "cpu", "fp32")


@pytest.fixture(scope="module")
def peer(tokenizer, tmp_path_factory) -> OpenedModel:
    """A Llama with random weights in a folder as transformers writes it; it has a vocabulary, and no chat template."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=600)
    LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=256)).save_pretrained(folder)
    tokenizer.save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf8"))
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf8")
    return open_model(str(folder), "cpu", "fp32")


@pytest.fixture(params=["own", "peer"])
def model(request) -> OpenedModel:
    return request.getfixturevalue(request.param)


def logits(model: OpenedModel, ids: list[int]) -> torch.Tensor:
    """(time, vocab) of one row, in one pass and without any cache."""
    network = model.answerer.model if isinstance(model, OwnModel) else model.network
    with torch.no_grad():
        return network(torch.tensor([ids])).logits[0].float()


def nats_by_hand(model: OpenedModel, ids: list[int], scored: int) -> float:
    log_probs = logits(model, ids[:-1]).log_softmax(-1)[scored - 1 :]
    return log_probs.gather(1, torch.tensor(ids[scored:])[:, None]).sum().item()


def values(scores: list[Score], group: str = "all") -> dict[str, float]:
    return {score.metric: score.value for score in scores if score.group == group}


# Likelihoods


def test_each_folder_is_opened_by_its_own_kind(own, peer):
    assert isinstance(own, OwnModel) and own.chats and own.context == 1024
    assert isinstance(peer, PeerModel) and not peer.chats and peer.context == 256


def test_continuations_have_the_likelihood_of_one_pass_over_the_whole_row(model):
    """Contexts of many lengths, and continuations of one token and of several, some of the same beginning."""
    rng = random.Random(0)
    line = lambda length: [rng.randrange(13, 600) for _ in range(length)]  # noqa: E731
    items = [(line(length), [line(1), line(5), line(1), line(20)]) for length in (1, 40, 7, 33, 90)]
    items.append((line(5), [line(1), line(1)]))
    for (context, choices), nats in zip(items, model.continuation_nats(items), strict=True):
        for choice, value in zip(choices, nats, strict=True):
            assert value == pytest.approx(nats_by_hand(model, context + choice, len(context)), rel=1e-4)


def test_windows_have_the_likelihood_of_one_pass(model):
    rng = random.Random(1)
    windows = [
        ([rng.randrange(13, 600) for _ in range(length)], scored) for length, scored in [(60, 1), (9, 4), (2, 1)]
    ]
    for (ids, scored), value in zip(windows, model.window_nats(windows), strict=True):
        assert value == pytest.approx(nats_by_hand(model, ids, scored), rel=1e-4)


def test_a_context_is_read_once_for_all_its_choices(own, monkeypatch):
    read = []
    forward = type(own.answerer.model).forward
    monkeypatch.setattr(
        type(own.answerer.model),
        "forward",
        lambda self, ids, **rest: read.append(ids.shape) or forward(self, ids, **rest),
    )
    own.continuation_nats([([20] * 64, [[21, 22], [23, 24], [25, 26], [27, 28]])])
    assert [tuple(shape) for shape in read] == [(1, 64), (4, 16)]
    read.clear()
    own.continuation_nats([([20] * 64, [[21], [22], [23], [24]])])  # letters need nothing but the context
    assert [tuple(shape) for shape in read] == [(1, 64)]


def test_this_projects_folder_through_transformers_gives_the_same(own, pretrained):
    other = PeerModel.open(pretrained / "final", "", torch.device("cpu"), torch.float32)
    chat: list[Message] = [{"role": "user", "content": "月牙镇在哪里？"}]
    assert other.encode_chat(chat) == own.encode_chat(chat) and other.encode("a b，c") == own.encode("a b，c")
    items = [(own.encode("月牙镇"), [own.encode("很美丽"), own.encode("在山下。")]), (own.encode("2+3"), [[20]])]
    for ours, theirs in zip(own.continuation_nats(items), other.continuation_nats(items), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for prompts in ([chat, chat], ["月牙镇", "the"]):
        assert own.reply(prompts, 8, 0.0, 0) == other.reply(prompts, 8, 0.0, 0)


def test_a_pair_is_encoded_as_one_text_and_cut_where_the_context_ends(own):
    context, (first, second) = encode_pairs(own, "Question: x\nAnswer: ", ["yes", "no"])
    assert context == own.encode("Question: x\nAnswer:")
    assert (first, second) == (own.encode(" yes"), own.encode(" no"))
    assert encode_pairs(own, "", ["yes"]) == ([own.bos], [own.encode("yes")])


def test_an_endless_context_loses_its_beginning_and_is_counted(own, monkeypatch):
    item = ChoiceItem("s", "月" * 3000, ("a", "b"), 0)
    suite, seen = MultipleChoice(data="x"), []
    monkeypatch.setattr(OwnModel, "continuation_nats", lambda self, items: seen.extend(items) or [[0.0, -1.0]])
    (row,) = suite.measure(own, [Asked(item, ())], 0)
    (context, choices), whole = seen[0], own.encode(suite._asked(item))
    assert row["cut"] and len(context) + len(choices[0]) == own.context + 1 and context == whole[-len(context) :]


# Multiple choice


def exam(folder: Path, count: int, seed: int = 0) -> Path:
    """Questions whose answers are in random places."""
    rng = random.Random(seed)
    for split, size in (("dev", 5), ("test", count)):
        (folder / split).mkdir(parents=True)
        rows = [f"What is {rng.randrange(1000)}?,{rng.random()},x,yes,no,{rng.choice('ABCD')}\n" for _ in range(size)]
        (folder / split / f"high_school_{split}.csv").write_text("".join(rows), encoding="utf8")
    return folder


def test_a_model_that_knows_nothing_is_at_chance(peer, tmp_path):
    """Whatever the form and the number of worked questions, chance lies in the interval, and the interval is narrow."""
    data = str(exam(tmp_path, 300))
    for form, shots in (("letters", 0), ("letters", 2), ("text", 0)):
        suite = MultipleChoice(data=data, form=form, shots=shots)
        items = suite.items(0)
        for score in suite.scores(items, suite.measure(peer, items, 0)):
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


# Texts


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 8, 4), (9, 8, 4), (50, 8, 4), (50, 8, 8), (50, 8, 1), (51, 64, 32)]
)
def test_windows_score_every_token_once_with_the_context_that_the_stride_leaves(length, window, stride):
    scored = []
    for first, start, end in rolling(length, window, stride):
        assert end - first <= window + 1 and start > first
        # Its own first window aside, each token has window - stride tokens before it, or all there are.
        assert start == 1 or start - first > window - stride
        scored += range(start, end)
    assert scored == list(range(1, length))


def test_bits_per_byte_are_those_of_the_texts_by_hand(model, tmp_path):
    texts = ["月牙镇的早晨很安静。", "a b c", "这是一篇长一些的文章，窗口装不下它。" * 4]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts), encoding="utf8")
    suite = TextLikelihood(data=str(path), column="body", window=32, stride=16)
    items = suite.items(0)
    rows, nats, tokens = suite.measure(model, items, 0), 0.0, 0
    for text in texts:
        line = [model.eos, *model.encode_bare(text)]
        for first, scored, end in rolling(len(line), 32, 16):
            nats -= nats_by_hand(model, line[first:end], scored - first)
        tokens += len(line) - 1
    found = values(suite.scores(items, rows))
    assert found["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-4
    )
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)


def test_a_text_file_is_one_document_as_for_perplexity(own, world):
    suite = TextLikelihood(data=str(world / "heldout.txt"), window=10**6, stride=10**6)
    (item,) = suite.items(0)
    text = item.text[:600]  # one window of either
    rows = suite.measure(own, [item._replace(text=text)], 0)
    assert rows[0]["nats"] == pytest.approx(score_text(own.answerer, iter([text])).nll, rel=1e-4)
    (bits, _) = suite.scores([item], rows)
    assert bits.low is None  # one document says nothing of others


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n{"txt": "y"}\n',
            r":2: no text in column 'text', the columns are 'txt'; set column",
        ),
        ("a.csv", "txt\nx\n", r":2: no text in column 'text', the columns are 'txt'"),
        ("a.jsonl", '{"text": 3}\n', r":1: no text in column 'text'"),
        ("a.jsonl", '{"text": "x"}\n{"te\n', r":2: broken JSON"),
        ("a.jsonl", '{"text": ""}\n', r": no text in it"),
        ("a.txt", "", r": no text in it"),
        ("a.txt", None, r": "),
    ],
)
def test_a_text_that_cannot_be_scored_is_one_line(name, content, what, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf8")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}{what}") as error:
        TextLikelihood(data=str(path)).items(0)
    assert "\n" not in str(error.value)


# Replies


class Parrot:
    """A model that says what it is told to; `asked` keeps what it was asked."""

    name, context, chats, bos, eos, dtype = "parrot", 1000, True, 1, 2, "fp32"

    def __init__(self, *replies: str, chats: bool = True) -> None:
        self.replies, self.asked, self.chats = list(replies), [], chats

    def encode(self, text: str) -> list[int]:
        return [5] * len(text)

    encode_bare = encode

    def encode_chat(self, messages: list[Message]) -> list[int]:
        return [5] * sum(len(message["content"]) for message in messages)

    def reply(self, prompts: list, max_new_tokens: int, temperature: float, seed: int) -> list[str]:
        self.asked += [(prompt, max_new_tokens, temperature, seed) for prompt in prompts]
        return [self.replies.pop(0) for _ in prompts]


def problems(path: Path, *rows: tuple[str, str]) -> str:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows), encoding="utf8")
    return str(path)


def test_answers_to_problems_are_compared_as_mathematics(tmp_path):
    data = problems(tmp_path / "p.jsonl", ("1+1?", "so it is #### 2"), ("half?", "1/2"), ("half?", "1/2"), ("3?", "3"))
    suite = ExactMatch(data=data)
    items, model = suite.items(0), Parrot("The answer is 2.", "\\boxed{\\frac{1}{2}}", "0.5", "4")
    assert len(items) == 4  # a question that is asked twice counts twice
    scores = suite.scores(items, suite.measure(model, items, 0))
    assert values(scores) == {"exact_match": 0.75} and (scores[0].items, scores[0].chance) == (4, None)


def test_several_samples_give_pass_at_k_and_the_majority(tmp_path):
    data = problems(tmp_path / "p.jsonl", ("1+1?", "2"), ("2+2?", "4"))
    suite = ExactMatch(data=data, samples=4, temperature=1.0, k=[1, 2, 4])
    items, model = suite.items(0), Parrot("2", "3", "it is 2", "3", "5", "5", "5.0", "4")
    rows = suite.measure(model, items, seed=7)
    assert [row["right"] for row in rows] == [[True, False, True, False], [False, False, False, True]]
    # 2 of 4: 1 - C(2,2)/C(4,2) = 5/6; 1 of 4: 1 - C(3,2)/C(4,2) = 1/2. The first vote is a draw, the second is lost.
    want = {"pass@1": 3 / 8, "pass@2": (5 / 6 + 1 / 2) / 2, "pass@4": 1.0, "maj@4": 0.25}
    assert values(suite.scores(items, rows)) == pytest.approx(want)
    assert {asked[1:] for asked in model.asked} == {(256, 1.0, 7)}


def test_worked_problems_come_first_as_turns_or_as_text(tmp_path):
    shots = problems(tmp_path / "s.jsonl", ("S1", "A1 #### 1"), ("S2", "A2 #### 2"))
    suite = ExactMatch(data=problems(tmp_path / "p.jsonl", ("Q", "3")), shots=2, shots_data=shots, system="Be brief.")
    chatting, plain = Parrot("3"), Parrot(" It is 3.\n\nQuestion: 4?\nAnswer: 5", chats=False)
    assert suite.measure(chatting, suite.items(0), 0)[0]["right"] == [True]
    assert [message["content"] for message in chatting.asked[0][0]] == [
        "Be brief.",
        "S1",
        "A1 #### 1",
        "S2",
        "A2 #### 2",
        "Q",
    ]
    assert suite.measure(plain, suite.items(0), 0)[0] == {"answers": ["It is 3."], "right": [True]}
    assert plain.asked[0][0] == (
        "Be brief.\n\nQuestion: S1\nAnswer: A1 #### 1\n\nQuestion: S2\nAnswer: A2 #### 2\n\nQuestion: Q\nAnswer:"
    )


def test_the_generators_held_out_sums_are_asked():
    items = ExactMatch(data="arithmetic:1-2", problems=6).items(0)
    assert [item.kind for item in items] == ["level 1", "level 2"] * 3 or len({item.kind for item in items}) >= 1
    assert len(items) == 6 and len(ExactMatch(data="arithmetic:1", problems=6).items(4)) == 4


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"samples": 4}, "samples 4: greedy answers are all the same"),
        ({"samples": 4, "temperature": 1.0, "k": [5]}, r"k \[5\]: each from 1 to samples = 4"),
        ({"shots": 3}, "shots 3: .* give a file"),
        ({"max_new_tokens": 0}, "must be 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, what):
    with pytest.raises(UserError, match=what):
        ExactMatch(data="arithmetic:1", **settings)


def test_a_problem_without_an_answer_is_named(tmp_path):
    data = problems(tmp_path / "p.jsonl", ("1+1?", "2"), ("2+2?", " "))
    with pytest.raises(UserError, match=r"p\.jsonl:2: the answer is empty; correct the row"):
        ExactMatch(data=data).items(0)


def test_a_question_that_has_no_room_gets_no_answer(tmp_path):
    model = Parrot("2")
    suite = ExactMatch(data=problems(tmp_path / "p.jsonl", ("x" * 990, "2"), ("1+1", "2")), max_new_tokens=20)
    assert [row["right"] for row in suite.measure(model, suite.items(0), 0)] == [[False], [True]] and len(
        model.asked
    ) == 1


def test_the_worlds_questions_are_counted_as_eval_questions_counts_them(own, world, tmp_path):
    lines = (world / "heldout_questions.jsonl").read_text(encoding="utf8").splitlines()[::12]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf8")
    asked = read_questions(path)
    replies = [result.reply for result in ask(own.answerer, asked)]
    rows = [json.loads(line) for line in lines]
    for place in (0, 3, 4):  # some of what it says is right
        rows[place]["answer"] = replies[place]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf8")
    suite = Questions(data=str(path))
    items = suite.items(0)
    scores = suite.scores(items, suite.measure(own, items, 0))
    want = accuracy(ask(own.answerer, read_questions(path)))
    assert {score.group: score.value for score in scores} == want and 0 < want["all"] < 1


def test_favours_in_style_are_counted(tmp_path):
    row = {"question": "Q", "answer": "你好！我去。再见。", "opening": "你好！", "closing": "再见。"}
    (tmp_path / "f.jsonl").write_text((json.dumps(row) + "\n") * 4, encoding="utf8")
    suite, model = (
        Style(data=str(tmp_path / "f.jsonl")),
        Parrot("你好！我去。再见。", "你好！我不去。再见。", "我去。", ""),
    )
    scores = suite.scores(suite.items(0), suite.measure(model, suite.items(0), 3))
    assert values(scores) == {"preferred": 0.5, "exact_match": 0.25} and model.asked[0][1:] == (48, 0.7, 3)


# Quality


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c d e f", 0.0),
        ("a b c d a b c d", 1 - 4 / 5),  # abcd bcda cdab dabc abcd
        ("好好好好好好", 1 - 1 / 3),
        ("a b c", 0.0),  # no four words
        ("", 0.0),
    ],
)
def test_repetition_is_the_share_of_four_words_that_stood_there_before(text, share):
    assert repetition(text) == pytest.approx(share)


def test_variety_and_language_are_counted_in_words():
    assert distinct(["a b a", "B c"], 1) == 3 / 5 and distinct(["a b a", "b c"], 2) == 1.0
    assert chinese_share("我 like 猫, 3!") == 0.5 and chinese_share("！？") == 0.0


def test_answers_are_described_without_a_judge(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "你好吗？"}\n{"prompt": "Who are you?"}\n', encoding="utf8")
    suite = Quality(data=str(path))
    replies = ["<think>\n想\n</think>\n<answer>\n我很好\n</answer>", ""]
    model = Parrot(*replies)
    found = values(suite.scores(suite.items(0), suite.measure(model, suite.items(0), 0)))
    assert found["characters"] == len(replies[0]) / 2 and found["empty"] == 0.5
    assert found["strict_format"] == found["loose_format"] == 0.5 and found["own_language"] == 0.5
    assert model.asked[0][1:] == (128, 0.7, 0)


def test_a_limit_takes_items_that_are_evenly_spread(world):
    suite = Questions(data=str(world / "heldout_questions.jsonl"))
    items = suite.items(0)
    assert suite.items(10) == [items[number * len(items) // 10] for number in range(10)]
    assert len({item.kind for item in suite.items(10)}) > 1
