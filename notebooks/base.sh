#!/usr/bin/env bash
# What several notebooks start from, made once: a small world, a tokenizer, about two minutes of pretraining, one of fine-tuning.
# Tokens end it, so that it is the same model on a busy machine.
# bash notebooks/base.sh world|tokenizer|pretrain|sft|sums
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=out/notebooks
PYTHON=${PYTHON:-python}

world() { test -f $OUT/world/pretrain.csv || $PYTHON -m world --out $OUT/world --scale 0.3; }
tokenizer() { world; test -f $OUT/tokenizer/tokenizer.json || $PYTHON train_tokenizer.py --data $OUT/world/pretrain.csv --out $OUT/tokenizer --vocab_size 2000; }
pretrain() {
    tokenizer
    test -d $OUT/pretrain/final || $PYTHON pretrain.py --config configs/demo/pretrain.yaml --data $OUT/world/pretrain.csv \
        --tokenizer $OUT/tokenizer --out $OUT/pretrain --shards $OUT/shards --max_tokens 830_000 --max_minutes 60 --resume true
}
sft() {
    pretrain
    test -d $OUT/sft/final || $PYTHON full_sft.py --config configs/demo/sft.yaml --ckpt $OUT/pretrain/final --data $OUT/world/sft.jsonl \
        --out $OUT/sft --max_tokens 550_000 --max_minutes 60 --resume true
}
# A model that knows what a sum looks like, and little else: rewards need answers that are sometimes right.
sums() {
    pretrain
    test -f $OUT/sums.jsonl || $PYTHON - > $OUT/sums.jsonl <<'END'
import json, random
from text.chats.arithmetic import arithmetic_problem
rng = random.Random(0)
for _ in range(20_000):
    question, answer = arithmetic_problem(rng, 1)
    print(json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}))
END
    test -d $OUT/sums/final || $PYTHON full_sft.py --config configs/demo/sft.yaml --ckpt $OUT/pretrain/final --data $OUT/sums.jsonl \
        --out $OUT/sums --max_tokens 590_000 --max_minutes 60 --resume true
}
"$1"
