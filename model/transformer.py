"""The whole network: embedding, layers, output head and the MTP chain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from LMConfig import LMConfig
from model.attention import AttentionMask, select_positions
from model.cache import Cache, LatentCache, OwnStep, SlotCache
from model.checkpoint.folder import load_pretrained, save_pretrained
from model.decoding import native
from model.experts import Experts
from model.layer import DecoderLayer
from model.moe import Router, Routing
from model.mtp import MTPLayer
from model.norm import RMSNorm
from model.rope import RotaryEmbedding


class Output(NamedTuple):
    """What a forward pass returns. Logits are computed when asked for: losses over chunks never hold all of them.

    Attributes:
        hidden: (batch, time, hidden) after the final norm.
        state: (batch, time, hidden) before the final norm, which is what MTP continues from.
        head: (vocab, hidden) weight of the output head.
        mtp_hidden: for each MTP depth k = 1 .. D, (batch, time, hidden) after its norm; position t predicts t+k+1.
        counts: (MoE layers, experts) float32, loads of this pass, the MTP layers' last; or None without MoE layers.
        balance_loss: (B,) float32, summed over MoE layers, times tokens (see `model.moe.Routing`).
        own_hidden: for each step j = 2 .. K of the last MTP depth D on its own state, (batch, time, hidden) after its
            norm; position t predicts t+D+1, and is real from the j-th of its segment on.
    """

    hidden: Tensor
    state: Tensor
    head: Tensor
    mtp_hidden: tuple[Tensor, ...]
    counts: Tensor | None
    balance_loss: Tensor | None
    own_hidden: tuple[Tensor, ...] = ()

    @property
    def logits(self) -> Tensor:
        """(batch, time, vocab) float32, of the main model."""
        return logits(self.hidden, self.head)

    def mtp_logits(self, depth: int) -> Tensor:
        """(batch, time, vocab) float32 of MTP depth 1 .. D."""
        return logits(self.mtp_hidden[depth - 1], self.head)


def logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden: (..., hidden) after a norm; head: (vocab, hidden). Returns (..., vocab) float32."""
    fast = native.project(hidden, head)
    return fast if fast is not None else F.linear(hidden, head.to(hidden.dtype)).float()


class Backbone(nn.Module):
    """Embedding, layers and final norm; named `model` inside the whole, as Hugging Face names it."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MiniDeepSeek(nn.Module):
    """DeepSeek-V3 as a plain module: `MiniDeepSeek(config)(input_ids).logits`.

    Args:
        config: the hyperparameters; weights start from a normal distribution of std `config.initializer_range`.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        depths = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        self.mtp = nn.ModuleList(MTPLayer(config, index) for index in depths)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.drafter: object | None = None  # see model.decoding.drafter
        self.apply(self._initialise)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: Cache | None = None,
        mtp: bool = False,
        last_positions: Tensor | None = None,
        mtp_steps: int = 1,
    ) -> Output:
        """Run the network over (batch, time) token ids.

        Args:
            position_ids: (batch, time); counted from 0, or from the end of the cache, when left out.
            segment_ids: (batch, time); positions attend within their own segment only; a negative id marks padding.
            cache: latents of the positions before these; the new ones are added to it. `LatentCache` for decoding,
                `PromptLatents` for training on several continuations of a prompt.
            mtp: also run the MTP chain over the tokens at hand (training; `speculative` generation runs it by itself).
            last_positions: (batch,) the one position of each row that is asked for, where a prompt is read into a
                cache: the output has no others, and the last layer computes none but their latents.
            mtp_steps: K, steps of the last MTP depth, the second and later ones on its own state (see `MTPLayer`); they
                are not counted in the experts' loads.
        """
        batch, time = input_ids.shape
        if position_ids is None:
            position_ids = self._positions(time, cache, input_ids.device)
        rope = self.rotary(position_ids)
        if isinstance(cache, SlotCache):
            attention_mask = AttentionMask.up_to(position_ids, cache.end)
        elif hasattr(cache, "attention_mask"):  # model.decoding.cuda_step: its length is no number that the host knows
            attention_mask = cache.attention_mask()
        elif cache is not None and cache.padding is not None:
            attention_mask = AttentionMask.left_padded(time, cache.length + time, cache.padding)
        elif segment_ids is not None:
            attention_mask = AttentionMask.within_segments(segment_ids)
        else:
            attention_mask = AttentionMask()
        token_mask = None if segment_ids is None else segment_ids >= 0

        embedding = self.model.embed_tokens(input_ids)
        if torch.is_autocast_enabled(input_ids.device.type):
            # A bfloat16 residual stream, as DeepSeek-V3's; autocast alone would carry it in float32.
            embedding = embedding.to(torch.get_autocast_dtype(input_ids.device.type))
        state, routings = embedding, []
        decoding = type(cache) in (LatentCache, SlotCache)
        fast = native.decoder(self.model.layers, self.config, embedding, cache) if decoding else None
        if fast is not None:
            state = fast.run(embedding, rope)
            state = state if last_positions is None else select_positions(state, last_positions)
        else:
            *layers, last = self.model.layers
            for layer in layers:
                state, routing = self._run(layer, state, rope, attention_mask, cache, token_mask)
                routings.append(routing)
            state, routing = self._run(last, state, rope, attention_mask, cache, token_mask, last_positions)
            routings.append(routing)
        mtp_hidden, mtp_state, latents = [], state, {}
        for depth, layer in enumerate(self.mtp if mtp else [], start=1):
            # Position t meets token t+depth. The last `depth` positions meet nothing real: losses leave them out.
            ahead = embedding.roll(-depth, dims=1)
            counted = torch.arange(time, device=input_ids.device).expand(batch, time) < time - depth
            counted = counted if token_mask is None else counted & token_mask
            first = OwnStep(latents, 1) if mtp_steps > 1 and depth == len(self.mtp) else None
            mtp_state, routing = self._run(layer, mtp_state, ahead, rope, attention_mask, first, counted)
            mtp_hidden.append(layer.shared_head.norm(mtp_state))
            routings.append(routing)
        own_hidden = []
        for number in range(2, mtp_steps + 1 if mtp_hidden else 0):
            # Position t meets the state of t-1. The first positions of a segment meet nothing real: see `own_hidden`.
            step = OwnStep(latents, number)
            seen_then = AttentionMask(step.allowed(time, segment_ids, input_ids.device))
            mtp_state, _ = self._run(layer, mtp_state.roll(1, dims=1), ahead, rope, seen_then, step, counted)
            own_hidden.append(layer.shared_head.norm(mtp_state))
        seen: list[Routing] = [routing for routing in routings if routing is not None]
        return Output(
            hidden=self.model.norm(state),
            state=state,
            head=self.lm_head.weight,
            mtp_hidden=tuple(mtp_hidden),
            own_hidden=tuple(own_hidden),
            counts=torch.stack([routing.counts for routing in seen]) if seen else None,
            balance_loss=torch.stack([routing.balance_loss for routing in seen]).sum(0) if seen else None,
        )

    def draft(self, state: Tensor, next_ids: Tensor, depth: int, cache: LatentCache) -> tuple[Tensor, Tensor]:
        """One MTP depth while decoding: logits of the token after the next, and the state for the following depth.

        Args:
            state: (batch, time, hidden) before the final norm (depth 1), or of the depth before.
            next_ids: (batch, time) the token `depth` places after each position.
            depth: 1 .. D; cache: made with `mtp=True`.
        """
        layer = self.mtp[depth - 1]
        held, time = cache.lengths[self.config.num_hidden_layers + depth - 1], next_ids.shape[1]
        positions = torch.arange(held, held + time, device=next_ids.device)[None]
        embedding = self.model.embed_tokens(next_ids).to(state.dtype)
        fast = native.decoder([layer], self.config, embedding, cache)
        if fast is not None:
            state = fast.run(layer.join(state, embedding), self.rotary(positions))
        else:
            state, _ = layer(state, embedding, self.rotary(positions), AttentionMask(), cache)
        return logits(layer.shared_head.norm(state[:, -1:]), self.lm_head.weight), state

    def routers(self) -> list[Router]:
        """The routers in the order of `Output.counts`."""
        return [layer.mlp.gate for layer in [*self.model.layers, *self.mtp] if layer.is_moe]

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Prompt and completion, (batch, time + new); see `model.decoding.generate.generate` for the options."""
        from model.decoding.generate import generate  # model.decoding.generate needs this class

        return generate(self, input_ids, **options)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        adapt: Callable[[LMConfig], LMConfig] = lambda config: config,
    ) -> MiniDeepSeek:
        """Open a Hugging Face folder of a `deepseek_v3` model; see `model.checkpoint.folder.load_pretrained`."""
        return load_pretrained(cls, folder, dtype, device, adapt)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, the weights and generation_config.json; see `model.checkpoint.folder.save_pretrained`."""
        save_pretrained(self, folder)

    def _run(self, layer: nn.Module, *inputs: Any) -> tuple[Tensor, Routing | None]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def _positions(self, time: int, cache: Cache | None, device: torch.device) -> Tensor:
        if isinstance(cache, SlotCache):
            return cache.positions
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + time, device=device)[None]
        if cache is not None and cache.padding is not None:
            positions = (positions - cache.padding[:, None]).clamp(min=0)
        return positions

    def _initialise(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding, Router)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
