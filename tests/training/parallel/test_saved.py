"""Weights in several files, which ranks share out, are a folder that others open."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from model import MiniDeepSeek
from training.parallel import saved


@pytest.mark.parametrize("tied", [False, True])
def test_files_written_by_ranks_are_one_model_to_transformers(tied, tiny_model, transformers, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "LARGEST", 20_000)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    model: MiniDeepSeek = tiny_model(tie_word_embeddings=tied)
    state, seen, held = model.state_dict(), [], []
    for rank in (2, 1, 0):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        weights = saved.ShardedModel(SimpleNamespace(model=model, shards=None))
        mine = {name: tensor for name, tensor in state.items() if weights._writers[name] == rank}
        seen += mine
        held.append(sum(tensor.nbytes for tensor in mine.values()))
        weights.write(mine, tmp_path)
    assert any(name.startswith("mtp.") for name in seen) and max(held) < 0.4 * sum(held)  # MTP is shared out too
    assert sorted(seen) == sorted(state) and len([*tmp_path.glob("model-*-of-*.safetensors")]) > 3
    ours = MiniDeepSeek.from_pretrained(Path(tmp_path)).state_dict()
    assert all(torch.equal(ours[name], state[name]) for name in state)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(12)[None] + 5
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
