"""vLLM itself on checkpoint folders: the same log-probabilities and the same greedy tokens, in float32 on the CPU.

python tests/checks/check_vllm.py --ckpt out/demo/sft/final [--vllm .venv-vllm/bin/python]

vLLM lives in an environment of its own, which `make check-vllm` installs. Each case is opened by a fresh process of it,
most of a minute. Ends with code 1 where anything differs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from check_gguf import QUESTIONS, SMALL, random_model
from safetensors.torch import load_file, save_file

from cli import call
from errors import UserError, command_line
from LMConfig import LMConfig
from model import MiniDeepSeek
from model.checkpoint.hf_import import export_vllm_cpu
from text.chats.chat_template import encode_chat
from text.tokenizer import Tokenizer
from training.parallel import saved

NEW_TOKENS = 24
TOLERANCE = 1e-4  # nats
CONTEXT = 512  # tokens that vLLM makes room for
SECONDS = 3600  # a case that takes longer hangs, on a busy machine too
# In vLLM's CPU build the kernel for latent attention has the released model's sizes and no others.
EXPANDED = {"VLLM_MLA_DISABLE": "1"}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
COMPILED = {"enforce_eager": False}  # torch.compile, vLLM's default
# A query head of 32, for vLLM's CPU kernel has no other small one.
UNTIED = {**SMALL, "vocab_size": 600, "qk_nope_head_dim": 24, "v_head_dim": 16, "max_position_embeddings": CONTEXT}
RELEASED_SIZES = {
    **UNTIED, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "q_lora_rank": 96, "n_routed_experts": 16, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 6,
    "routed_scaling_factor": 2.5,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": CONTEXT // 4, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip


@dataclass
class Case:
    """A folder to compare. `environment` and `options`: of vLLM; prompts: token ids."""

    name: str
    folder: Path
    prompts: list[list[int]]
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)


def check(ckpt: str, vllm: str = ".venv-vllm/bin/python") -> None:
    """Compare checkpoint folders in vLLM with this project.

    Args:
        ckpt: checkpoint folder.
        vllm: the Python of an environment in which vLLM is installed.
    """
    if not Path(vllm).is_file():
        raise UserError(f"{vllm}: is not there; run make check-vllm, which installs vLLM")
    with tempfile.TemporaryDirectory() as name:
        with redirect_stdout(None):
            cases = [*of_checkpoint(Path(ckpt), Path(name)), *of_random_weights(Path(name))]
            cases.append(of_several_files(cases[-1], Path(name) / "several files"))
        differing = [case.name for case in cases if differs(case, vllm, Path(name))]
    print(f"differs: {', '.join(differing)}" if differing else "vLLM and this project agree")
    sys.exit(bool(differing))


def of_checkpoint(ckpt: Path, folder: Path) -> list[Case]:
    """The checkpoint as exported for vLLM's CPU build, and as it is; compiled, vLLM does without its kernel of RoPE."""
    tokenizer, exported = Tokenizer.from_folder(ckpt), folder / "exported"
    export_vllm_cpu(ckpt, exported)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [encode_chat(tokenizer, chat, add_generation_prompt=True)[0] for chat in chats]
    return [
        Case(f"{ckpt}, exported", exported, prompts, EXPANDED),
        Case(f"{ckpt}, as it is, compiled", ckpt, prompts, EXPANDED, COMPILED),
    ]


def of_random_weights(folder: Path) -> list[Case]:
    """An untied model of small sizes, and one of the released model's head sizes, each with MTP layer and without."""
    cases = []
    for mtp in (0, 1):
        end = "with MTP layer" if mtp else "without MTP layer"
        small, released = folder / f"small {end}", folder / f"released sizes {end}"
        random_model({**UNTIED, "num_nextn_predict_layers": mtp}).save_pretrained(folder / f"plain {end}")
        export_vllm_cpu(folder / f"plain {end}", small)
        random_model({**RELEASED_SIZES, "num_nextn_predict_layers": mtp}).save_pretrained(released)
        prompts = [torch.randint(13, 600, (length,)).tolist() for length in (1, 7, 60, 200)]
        cases.append(Case(f"small, untied, {end}", small, prompts, EXPANDED))
        cases.append(Case(f"released head sizes, YaRN, groups, {end}", released, prompts))
    return cases


def of_several_files(case: Case, folder: Path) -> Case:
    """The same weights as a run over ranks writes a large model: several files, MTP among them, with one index."""
    weights = load_file(case.folder / "model.safetensors") | load_file(case.folder / "mtp.safetensors")
    shutil.copytree(case.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = LMConfig.from_pretrained(folder)
    with mock.patch.object(saved, "LARGEST", sum(weight.nbytes for weight in weights.values()) // 3):
        index = saved.index_of(saved.files_of(config), config)
    for file in set(index["weight_map"].values()):
        save_file({name: weights[name] for name, place in index["weight_map"].items() if place == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Case(f"{case.name}, {len(set(index['weight_map'].values()))} files", folder, case.prompts)


def differs(case: Case, vllm: str, folder: Path) -> bool:
    """Whether a greedy token or the log-probability of any token differs; prints one line."""
    theirs, model = asked(case, vllm, folder), MiniDeepSeek.from_pretrained(case.folder).eval()
    equal, tokens, difference = 0, 0, 0.0
    for prompt, answer in zip(case.prompts, theirs, strict=True):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, temperature=0.0)
        equal += ids[0, len(prompt) :].tolist() == answer["tokens"]
        given = torch.tensor([prompt + answer["tokens"]])
        with torch.no_grad():
            log_probs = model(given).logits[0, :-1].log_softmax(-1)
        ours = log_probs.gather(1, given[0, 1:, None])[:, 0]
        tokens += len(ours)
        difference = max(difference, float((ours - torch.tensor(answer["log_probs"])).abs().max()))
    print(
        f"{case.name}: {equal} of {len(case.prompts)} greedy answers of {NEW_TOKENS} tokens equal, "
        f"log-probabilities of {tokens} tokens differ by at most {difference:.2g}",
        flush=True,
    )
    return equal < len(case.prompts) or not difference <= TOLERANCE


def asked(case: Case, vllm: str, folder: Path) -> list[dict]:
    """What vLLM says to the prompts; see tests/checks/vllm_side.py."""
    job, answers = folder / "job.json", folder / "answers.json"
    options = {"max_model_len": CONTEXT, "enforce_eager": True, **case.options}
    content = {"folder": str(case.folder), "prompts": case.prompts, "new_tokens": NEW_TOKENS, "options": options}
    if not (case.folder / "tokenizer.json").exists():
        options["skip_tokenizer_init"] = True
    job.write_text(json.dumps(content))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [vllm, str(Path(__file__).with_name("vllm_side.py")), str(job), str(answers)]
    answers.unlink(missing_ok=True)
    done = subprocess.run(
        command, env={**environment, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(folder / "cache"), **case.environment},
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    if done.returncode or not answers.is_file():
        print(done.stderr, file=sys.stderr)
        raise UserError(f"{case.name}: vLLM ended with code {done.returncode}; what it said is above")
    return json.loads(answers.read_text())


if __name__ == "__main__":
    command_line(lambda: call(check, __doc__ or ""))
