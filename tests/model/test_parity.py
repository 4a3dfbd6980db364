"""The same numbers as transformers' DeepseekV3ForCausalLM, and each side's checkpoints opened by the other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import MiniDeepSeek

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 1}
SHAPES = {
    "plain": {},
    "without groups": {"n_group": 1, "topk_group": 1},
    "all groups kept": {"n_group": 4, "topk_group": 4},
    "many groups": {"n_routed_experts": 16, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 5},
    "without q_lora": {"q_lora_rank": None},
    "several dense layers": {"num_hidden_layers": 4, "first_k_dense_replace": 3},
    "no dense layer": {"first_k_dense_replace": 0},
    "two shared experts": {"n_shared_experts": 2},
    "scaled routing": {"routed_scaling_factor": 2.5},
    "weights not normalised": {"norm_topk_prob": False},
    "tied embeddings": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "wide rms eps": {"rms_norm_eps": 1e-2},
    "yarn with mscale_all_dim": {"rope_parameters": {**YARN, "rope_theta": 100.0, "mscale_all_dim": 1.0}},
    "yarn with both mscales": {
        "rope_parameters": {**YARN, "rope_theta": 100.0, "mscale": 0.7, "mscale_all_dim": 1.2},
        "q_lora_rank": None,
    },
    "yarn without mscale": {"rope_parameters": {**YARN, "rope_theta": 100.0}},
}


def into_one_file(folder: Path) -> None:
    """Put MTP's weights among the others, as the released V3 and older folders have them."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "mtp.safetensors").unlink()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_opens_their_checkpoint_with_the_same_logits(shape, their_model, ids, tmp_path):
    theirs = their_model(**copy.deepcopy(SHAPES[shape]))
    theirs.save_pretrained(tmp_path)
    ours = MiniDeepSeek.from_pretrained(tmp_path)
    expected = theirs(ids).logits
    assert expected.std() > 0.3  # numbers large enough that 1e-5 means something
    torch.testing.assert_close(ours(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_they_open_our_checkpoint_with_the_same_logits(shape, tiny_model, ids, tmp_path, open_silently, transformers):
    changes = copy.deepcopy(SHAPES[shape])
    if rope := changes.pop("rope_parameters", None):
        changes.update(rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    ours = tiny_model(num_nextn_predict_layers=0, **changes)
    ours.save_pretrained(tmp_path)
    theirs = open_silently(tmp_path)
    assert isinstance(theirs, transformers.DeepseekV3ForCausalLM)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mtp_weights_in_their_own_file_are_not_reported(tiny_model, ids, tmp_path, open_silently):
    ours = tiny_model(num_nextn_predict_layers=2)
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(ours(ids).logits, open_silently(tmp_path)(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mtp_weights_among_the_others_do_not_disturb_their_main_model(tiny_model, ids, tmp_path, transformers):
    ours = tiny_model(num_nextn_predict_layers=2)
    ours.save_pretrained(tmp_path)
    into_one_file(tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert report["unexpected_keys"]
    assert all(name.startswith(("model.layers.3.", "model.layers.4.")) for name in report["unexpected_keys"])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", ["plain", "yarn with both mscales"])
@torch.no_grad()
def test_bfloat16_logits_agree_to_a_hundredth(shape, their_model, ids, tmp_path, monkeypatch):
    theirs = their_model(initializer_range=0.05, **copy.deepcopy(SHAPES[shape])).bfloat16()
    theirs.save_pretrained(tmp_path)
    chosen = []
    for module in theirs.modules():
        if type(module).__name__ == "DeepseekV3TopkRouter":
            module.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
    expected = theirs(ids).logits.float()
    agreed = []

    def logits(dtype: torch.dtype) -> torch.Tensor:
        """Ours, with their choice of experts: where two scores nearly tie, rounding alone decides."""
        model = MiniDeepSeek.from_pretrained(tmp_path, dtype=dtype)
        for router, indices in zip(model.routers(), chosen, strict=True):

            def replay(scores, choose=router.choose, indices=indices):
                agreed.append((choose(scores).sort().values == indices.sort().values).float().mean())
                return indices

            monkeypatch.setattr(router, "choose", replay)
        return model(ids).logits

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm())

    ours, exact = logits(torch.bfloat16), logits(torch.float32)
    assert ours.dtype == torch.float32
    assert difference(ours, expected) < 1e-2
    assert difference(ours, exact) < 1.2 * difference(expected, exact)  # and not because both stray together
    assert torch.stack(agreed).mean() > 0.95


@pytest.mark.parametrize("shape", ["plain", "without q_lora", "yarn with both mscales"])
def test_greedy_generation_gives_their_tokens(shape, their_model, ids, tmp_path):
    theirs = their_model(**copy.deepcopy(SHAPES[shape]))
    theirs.save_pretrained(tmp_path)
    expected = theirs.generate(
        ids[:, :9], attention_mask=torch.ones_like(ids[:, :9]), max_new_tokens=30, do_sample=False, eos_token_id=None
    )
    ours = MiniDeepSeek.from_pretrained(tmp_path)
    tokens = ours.generate(ids[:, :9], max_new_tokens=30, temperature=0.0)
    assert len(set(tokens[0, 9:].tolist())) > 3  # not one token over and over, which many models would agree on
    assert torch.equal(tokens, expected)


@torch.no_grad()
def test_mtp_logits_equal_their_mtp_model(tiny_model, ids, tmp_path, transformers):
    ours = tiny_model(num_nextn_predict_layers=1, rms_norm_eps=1e-3)
    ours.save_pretrained(tmp_path)
    into_one_file(tmp_path)
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3\..*"]  # where it looks for MTP weights
    theirs = transformers.modeling_layers.MtpModel.from_pretrained(main).eval()
    states = []
    main.model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    main(ids)
    # Position t joins the state before the final norm with token t+1.
    positions = torch.arange(1, ids.shape[1])[None]
    hidden = theirs.forward_layer(0, states[0][:, :-1], positions, None, input_ids=ids[:, 1:])
    expected = theirs._project_to_logits(hidden)
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(ids, mtp=True).mtp_logits(1)[:, :-1], expected, atol=1e-5, rtol=1e-5)
