"""vLLM's half of check_vllm.py, run by the Python of its own environment: `vllm_side.py JOB.json ANSWERS.json`.

A job is `{"folder", "prompts": lists of token ids, "new_tokens", "options": of vllm.LLM}`; answers are, for each
prompt, its greedy tokens and the log-probabilities of all tokens after the prompt's first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(job_file: str, answers_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    engine = LLM(
        job["folder"],
        dtype="float32",
        max_num_seqs=8,
        enable_prefix_caching=False,
        **job["options"],
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=job["new_tokens"], ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    answers = []
    for ids, answer in zip(job["prompts"], engine.generate(prompts, sampling), strict=True):
        tokens = list(answer.outputs[0].token_ids)
        found = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
        said = [place[token].logprob for place, token in zip(found, [*ids[1:], *tokens], strict=True)]
        answers.append({"tokens": tokens, "log_probs": said})
    Path(answers_file).write_text(json.dumps(answers))


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(*sys.argv[1:])
