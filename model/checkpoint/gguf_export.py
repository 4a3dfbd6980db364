"""A checkpoint as one GGUF file for llama.cpp: its architecture `deepseek2`, which is DeepSeek-V2's and V3's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from torch import Tensor

from errors import UserError
from LMConfig import LMConfig
from model.checkpoint.gguf_tokenizer import read_tokenizer
from model.transformer import MiniDeepSeek


def export_gguf(folder: Path, out: Path, kind: str = "f16") -> None:
    """Write the checkpoint `folder` as the GGUF file `out`, complete or not at all. MTP layers are left out.

    Args:
        kind: f32, f16, bf16 or q8_0, of the matrices; norms, routers and their biases stay float32.
    Raises:
        UserError: the package gguf is not installed, llama.cpp cannot express the config, or the tokenizer is not ours.
    """
    gguf = _gguf()
    config = LMConfig.from_pretrained(folder)
    if reasons := not_in_llama_cpp(config):
        raise UserError(f"{folder / 'config.json'}: llama.cpp cannot run this model: {'; '.join(reasons)}")
    tokenizer = read_tokenizer(folder, config)
    model = MiniDeepSeek.from_pretrained(folder)
    partial = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, "deepseek2")
    try:
        add_config(writer, config, gguf)
        for method, value in tokenizer.items():
            getattr(writer, method)(value)
        file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[kind]
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, tensor in gguf_tensors(model, gguf):
            numbers = gguf.GGMLQuantizationType[storage(name, tensor, kind).upper()]
            data = gguf.quants.quantize(np.ascontiguousarray(tensor.numpy()), numbers)
            writer.add_tensor(name, data, raw_dtype=numbers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    for notice in notices(config):
        print(f"notice: {notice}", file=sys.stderr)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, matrices in {kind}")


def not_in_llama_cpp(config: LMConfig) -> list[str]:
    """What the config asks of llama.cpp's deepseek2 that it does not do; each reason in a few words."""
    moe = config.first_k_dense_replace < config.num_hidden_layers
    # It tells DeepSeek-V2-Lite, which has no query latent, by the number of layers.
    lite = config.num_hidden_layers in (26, 27) or (config.num_hidden_layers == 48 and config.vocab_size == 128256)
    yarn = config.rope_scaling or {}
    reasons = [
        (config.attention != "mla", f"attention {config.attention} is not DeepSeek-V3's"),
        (config.attention_bias, "attention_bias is not read"),
        (moe and config.n_shared_experts == 0, "n_shared_experts = 0, at least one shared expert is needed"),
        (lite and config.q_lora_rank is not None,
         f"q_lora_rank with num_hidden_layers = {config.num_hidden_layers}, which it takes for DeepSeek-V2-Lite"),
        (yarn and (not yarn.get("mscale_all_dim") or yarn.get("mscale") != yarn["mscale_all_dim"]),
         "YaRN with mscale other than mscale_all_dim"),
        (yarn and yarn.get("attention_factor") is not None, "YaRN with attention_factor"),
        (yarn and ((yarn.get("beta_fast") or 32) != 32 or (yarn.get("beta_slow") or 1) != 1),
         "YaRN with beta_fast, beta_slow other than 32, 1"),
        (yarn and yarn["factor"] < 1, "YaRN with a factor below 1"),
    ]  # fmt: skip
    return [reason for holds, reason in reasons if holds]


def notices(config: LMConfig) -> list[str]:
    """Where a file that llama.cpp opens may still answer otherwise than the checkpoint."""
    out = []
    if config.topk_group < config.n_group:
        out.append(
            f"experts are chosen within {config.topk_group} of {config.n_group} groups: an older llama.cpp, without "
            "'expert_group_count', opens the file and answers otherwise"
        )
    if config.rms_norm_eps != 1e-6:
        out.append(f"llama.cpp takes rms_norm_eps = {config.rms_norm_eps} for the latents' norms too; here it is 1e-6")
    return out


def add_config(writer: object, config: LMConfig, gguf: ModuleType) -> None:
    """llama.cpp runs MLA absorbed: one key of (latent, RoPE) for all heads, its value the latent."""
    writer.add_name("Mini DeepSeek-V3")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config.q_lora_rank or 0)  # 0: queries without a latent
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.topk_group < config.n_group:  # llama.cpp stops at groups that limit nothing
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if yarn := config.rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn["factor"])
        writer.add_rope_scaling_orig_ctx_len(yarn["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * yarn["mscale_all_dim"])  # deepseek2 divides by 0.1 when it reads it


def gguf_tensors(model: MiniDeepSeek, gguf: ModuleType) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, with the last axis the one that a product runs over."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name.startswith("mtp.") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue  # llama.cpp takes the embedding where there is no head
        for part, matrix in _parts(name, tensor, config):
            yield names.get_name(part, try_suffixes=(".weight", ".bias")), matrix


def _parts(name: str, tensor: Tensor, config: LMConfig) -> list[tuple[str, Tensor]]:
    """The tensor under the name that the package gguf knows, or what is apart there."""
    prefix, _, kind = name.rpartition("experts.")
    if name.endswith("kv_b_proj.weight"):
        # Absorbed: W^UK goes into the query, so it is stored the other way round; W^UV is applied to the latents' sum.
        sizes = [config.qk_nope_head_dim, config.v_head_dim]
        key, value = tensor.unflatten(0, (config.num_attention_heads, -1)).split(sizes, dim=1)
        return [(name.replace("kv_b", "k_b"), key.transpose(1, 2)), (name.replace("kv_b", "v_b"), value)]
    if kind == "gate_up_proj":
        parts = zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True)
        return [(f"{prefix}experts.{part}_proj.weight", matrix) for part, matrix in parts]
    return [(f"{name}.weight" if kind == "down_proj" else name.replace("correction_bias", "correction.bias"), tensor)]


def storage(name: str, tensor: Tensor, kind: str) -> str:
    """The type a tensor is written in: the asked one for matrices, where it can hold them."""
    if tensor.dim() < 2 or name.endswith("ffn_gate_inp.weight"):
        return "f32"
    if kind == "q8_0" and tensor.shape[-1] % 32:  # q8_0 has blocks of 32
        return "f16"
    return kind


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError("the package gguf is not installed; pip install gguf==0.19.0") from None
    return gguf
