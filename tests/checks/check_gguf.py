"""llama.cpp itself on an exported checkpoint: the same tokens from text, the same logits, the same greedy answers.

python tests/checks/check_gguf.py --ckpt out/demo/grpo/final [--questions data/demo/heldout_questions.jsonl]

Needs llama-cpp-python, whose build takes long: `make check-gguf` installs it. Ends with code 1 where anything differs.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch

from cli import call
from errors import UserError, command_line
from eval.answering import Answerer
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.checkpoint.gguf_export import export_gguf
from model.norm import RMSNorm
from text.chats.chat_template import Message, encode_chat
from text.tokenizer import SPECIAL_TOKENS, Tokenizer

F32 = 0  # ggml's number of the type: llama.cpp stores latents in f16 by default
TEXTS = [
    "你好，世界！今天是2024年10月1日，星期二。",
    "The quick brown fox isn't here; we'll see THEY'RE late, he'd say.",
    "3.14159 + 2.71828 = 5.85987, 1,000,000 and 0x1F",
    "def f(x):\n    return x ** 2  # square\n\n\n\tif x != 0 and y >= 1: print('ok')",
    "  leading, trailing  \n\n \t mixed \r\n lines   ",
    "emoji 😀👩‍👩‍👧 café naïve Ünïcödé עברית العربية ไทย 한국어 にほんご",
    "spelled </s> <|user|> <think> <unk> <s><pad>",
    "",
]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.7}
SMALL = dict(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
    n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, q_lora_rank=48, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24, max_position_embeddings=1024, initializer_range=0.1,
)  # fmt: skip
SHAPES: dict[str, dict] = {
    "groups, MTP left out": {},
    "no groups": {"n_group": 1, "topk_group": 1},
    "all groups kept": {"topk_group": 4},
    "tied embeddings": {"tie_word_embeddings": True},
    "no query latent": {"q_lora_rank": None},
    "no query latent, as deep as V2-Lite": {"q_lora_rank": None, "num_hidden_layers": 27},
    "two shared experts, scaled routing": {"n_shared_experts": 2, "routed_scaling_factor": 2.5},
    "weights not normalised": {"norm_topk_prob": False},
    "no dense layer": {"first_k_dense_replace": 0},
    "dense layers only": {"first_k_dense_replace": 3},
    "YaRN": {"rope_scaling": YARN},
    "YaRN as DeepSeek-V3": {"rope_scaling": {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "more embeddings than tokens": {"vocab_size": None},
}
QUESTIONS = [
    "你好，请介绍一下自己。",
    "3加5等于几？",
    "What is 12 - 7?",
    "Tell me a story about a cat.",
    "Hello! Who are you?",
]


def check(ckpt: str, questions: str = "", count: int = 40, max_new_tokens: int = 48, random_texts: int = 3000) -> None:
    """Compare a checkpoint with llama.cpp running its export.

    Args:
        ckpt: checkpoint folder.
        questions: JSONL with a `question` a line, asked besides the built-in ones.
        count: of them, at most.
        max_new_tokens: most tokens of an answer.
        random_texts: texts of random characters to tokenise.
    """
    try:
        import llama_cpp
    except ImportError:
        raise UserError("llama-cpp-python is not installed; run make check-gguf") from None
    tokenizer, model = Tokenizer.from_folder(ckpt), MiniDeepSeek.from_pretrained(ckpt)
    asked = list(QUESTIONS)
    if questions:
        lines = Path(questions).read_text(encoding="utf8").splitlines()
        asked += [json.loads(line)["question"] for line in random.Random(0).sample(lines, min(count, len(lines)))]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in SHAPES.items():
            failed |= logits_differ(name, changes, tokenizer, Path(folder) / name)
        for kind in ("f32", "f16", "q8_0"):
            file = Path(folder) / f"{kind}.gguf"
            export_gguf(Path(ckpt), file, kind)
            theirs = opened(file)
            if kind == "f32":
                failed |= tokens_differ(theirs, tokenizer, random_texts)
                failed |= chats_differ(theirs, tokenizer, asked)
                failed |= replies_differ(theirs, ckpt, asked, max_new_tokens)
            failed |= answers_differ(kind, theirs, model, tokenizer, asked, max_new_tokens) and kind == "f32"
            theirs.close()
    print("differs" if failed else f"llama-cpp-python {llama_cpp.__version__} and this project agree")
    sys.exit(failed)


def opened(file: Path) -> object:
    """The file in llama.cpp, with a cache in float32 as ours is."""
    from llama_cpp import Llama

    return Llama(str(file), n_ctx=1024, n_threads=1, verbose=False, logits_all=True, type_k=F32, type_v=F32)


def logits_differ(name: str, changes: dict, tokenizer: Tokenizer, folder: Path) -> bool:
    """Whether a small model with random weights, norms and router biases gives other logits over 200 random tokens."""
    changes = {**changes, **({"vocab_size": tokenizer.vocab_size + 7} if "vocab_size" in changes else {})}
    model = random_model({"vocab_size": tokenizer.vocab_size, **SMALL, **changes})
    model.save_pretrained(folder)
    tokenizer.save(folder)
    with redirect_stdout(None), redirect_stderr(None):
        export_gguf(folder, folder / "f32.gguf", "f32")
    theirs = opened(folder / "f32.gguf")
    ids = torch.randint(13, tokenizer.vocab_size, (1, 200))
    theirs.eval(ids[0].tolist())
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
    difference = float(np.abs(theirs.scores[:200] - logits).max())
    theirs.close()
    print(f"{name}: logits differ by at most {difference:.2g} where their deviation is {logits.std():.2g}")
    return not difference < 1e-4 * logits.std()


def random_model(sizes: dict) -> MiniDeepSeek:
    """A model of random weights, norms and router biases."""
    torch.manual_seed(0)
    model = MiniDeepSeek(LMConfig(**sizes)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.uniform_(0.5, 1.5)
        for router in model.routers():
            router.e_score_correction_bias.uniform_(-0.3, 0.3)
    return model


def tokens_differ(theirs: object, tokenizer: Tokenizer, random_texts: int) -> bool:
    """Whether any text is split otherwise; texts of all scripts, and random ones."""
    rng = random.Random(0)
    ranges = [(0x20, 0x7F), (0x09, 0x0E), (0xA0, 0x250), (0x370, 0x530), (0x4E00, 0x9FA6), (0x3000, 0x3100),
              (0x2000, 0x2070), (0x1F300, 0x1F650)]  # fmt: skip
    texts = [*TEXTS]
    for _ in range(random_texts):
        low, high = zip(*rng.choices(ranges, k=rng.randint(1, 30)), strict=True)
        texts.append("".join(chr(rng.randrange(a, b)) for a, b in zip(low, high, strict=True)))
    wrong = [t for t in texts if theirs.tokenize(t.encode(), add_bos=False, special=False) != tokenizer.encode(t)]
    special = [theirs.tokenize(t.encode(), add_bos=False, special=True) for t in SPECIAL_TOKENS]
    marks = special == [[number] for number in range(len(SPECIAL_TOKENS))]
    print(f"tokens: {len(texts) - len(wrong)} of {len(texts)} texts equal, special ones {'too' if marks else 'not'}")
    for text in wrong[:3]:
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        print(f"  {text!r}: ours {tokenizer.encode(text)}, theirs {ids}")
    return bool(wrong) or not marks


def chats_differ(theirs: object, tokenizer: Tokenizer, questions: Sequence[str]) -> bool:
    """Whether the file's chat template gives other tokens than ours."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = theirs.metadata["tokenizer.chat_template"]
    formatter = Jinja2ChatFormatter(template, eos_token="</s>", bos_token="<s>")
    wrong = 0
    for question in questions:
        messages: list[Message] = [{"role": "system", "content": "简短回答。"}, {"role": "user", "content": question}]
        prompt = formatter(messages=messages).prompt.encode()
        ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
        wrong += theirs.tokenize(prompt, add_bos=False, special=True) != ids
    print(f"chat template: {len(questions) - wrong} of {len(questions)} prompts equal")
    return bool(wrong)


def replies_differ(theirs: object, ckpt: str, questions: Sequence[str], max_new_tokens: int) -> bool:
    """Whether llama.cpp's own chat, from messages to text, answers anything else than ours."""
    chats: list[list[Message]] = [[{"role": "user", "content": question}] for question in questions]
    ours = list(Answerer.open(ckpt, device="cpu", dtype="fp32").replies(chats, max_new_tokens))
    options = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": max_new_tokens}
    replies = [theirs.create_chat_completion(chat, **options)["choices"][0]["message"]["content"] for chat in chats]
    equal = sum(a == b for a, b in zip(ours, replies, strict=True))
    print(f"create_chat_completion: {equal} of {len(questions)} texts equal")
    return equal < len(questions)


def answers_differ(
    kind: str, theirs: object, model: MiniDeepSeek, tokenizer: Tokenizer, questions: Sequence[str], max_new_tokens: int
) -> bool:
    """Whether any greedy answer has other tokens; prints how far logits differ over prompts and answers."""
    equal, tokens, differences, spread, example = 0, 0, [], 0.0, ""
    for question in questions:
        prompt, _ = encode_chat(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
        ids = torch.tensor([prompt])
        ours = model.generate(ids, max_new_tokens=max_new_tokens, temperature=0.0, eos_token_id=tokenizer.eos_id)
        answer = ours[0, len(prompt) :].tolist()
        given = greedy(theirs, prompt, max_new_tokens, tokenizer.eos_id)
        equal += given == answer
        tokens += len(answer)
        example = example or f"{question} -> {tokenizer.decode(given)}"
        theirs.reset()
        theirs.eval(ours[0].tolist())
        with torch.no_grad():
            logits = model(ours).logits[0].numpy()
        differences.append(np.abs(theirs.scores[: len(logits)] - logits).max(-1))
        spread = max(spread, float(logits.std()))
    positions = np.concatenate(differences)
    print(
        f"{kind}: {equal} of {len(questions)} greedy answers equal ({tokens} tokens); logits differ by at most "
        f"{positions.max():.2g}, at half the positions by less than {np.median(positions):.2g}, where their deviation "
        f"is {spread:.2g}; {example}"
    )
    return equal < len(questions)


def greedy(theirs: object, prompt: Sequence[int], max_new_tokens: int, end: int) -> list[int]:
    """Token by token through llama.cpp's own cache."""
    theirs.reset()
    theirs.eval(prompt)
    answer: list[int] = []
    while len(answer) < max_new_tokens:
        answer.append(int(np.argmax(theirs.scores[theirs.n_tokens - 1])))
        if answer[-1] == end:
            break
        theirs.eval(answer[-1:])
    return answer


if __name__ == "__main__":
    command_line(lambda: call(check, __doc__))
