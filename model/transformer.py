"""The whole network: embedding, layers, output head and the MTP chain (DeepSeek-V3, Figures 2 and 3)."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from LMConfig import LMConfig
from model.cache import Cache
from model.checkpoint.folder import load_pretrained, save_pretrained
from model.experts import Experts
from model.layer import DecoderLayer
from model.moe import Router, Routing
from model.mtp import MTPChain, MTPLayer, MTPOutput
from model.norm import RMSNorm
from model.ops import autocast, head_logits, packed_mask
from model.rope import RotaryEmbedding


class Output(NamedTuple):
    """What a forward pass returns. Logits are computed when asked for: losses over chunks never hold all of them.

    Attributes:
        hidden: (batch, time, hidden) after the final norm.
        state: (batch, time, hidden) before the final norm, which is what MTP continues from.
        head: (vocab, hidden) weight of the output head.
        mtp_hidden: for each MTP depth k = 1 .. D, (batch, time, hidden) after its norm; position t predicts t+k+1.
        mtp_unrolled: for each further step j = 2 .. K of the last depth D on its own state, (batch, time, hidden)
            after its norm; position t predicts t+D+1, and is defined from the j-th of its segment on.
        counts: (MoE layers, experts) float32, loads of this pass, the MTP layers' last; or None without MoE layers.
        balance_loss: (B,) float32, summed over MoE layers, times tokens (see `model.moe.Routing`).
    """

    hidden: Tensor
    state: Tensor
    head: Tensor
    mtp_hidden: tuple[Tensor, ...]
    mtp_unrolled: tuple[Tensor, ...]
    counts: Tensor | None
    balance_loss: Tensor | None

    @property
    def logits(self) -> Tensor:
        """(batch, time, vocab) float32, of the main model."""
        return head_logits(self.hidden, self.head)

    def mtp_logits(self, depth: int) -> Tensor:
        """(batch, time, vocab) float32 of MTP depth 1 .. D."""
        return head_logits(self.mtp_hidden[depth - 1], self.head)


class Backbone(nn.Module):
    """Embedding, layers and final norm; named `model` inside the whole, as Hugging Face names it."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MiniDeepSeek(nn.Module):
    """DeepSeek-V3 as a plain module: `MiniDeepSeek(config)(input_ids).logits`. Weights start as the config says."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        depths = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        self.mtp = MTPChain(MTPLayer(config, index) for index in depths)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.has_dropout = True  # whether a layer that is computed again must draw what it drew before
        self.apply(self._initialise)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: Cache | None = None,
        mtp: int = 0,
        segment_ends: Tensor | None = None,
        state: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> Output:
        """Run the network over (batch, time) token ids.

        Args:
            position_ids: (batch, time); counted from 0, or from the end of the cache, when left out.
            segment_ids: (batch, time); positions attend within their own segment only; a negative id marks padding.
            cache: latents of the positions before these; the new ones are added to it. `LatentCache` for decoding,
                `PromptLatents` for training on several continuations of a prompt.
            segment_ends: of `segment_ids`, from `model.kernels.attention.segment_ends`; made here when left out.
            mtp: 1 also runs the MTP chain over the tokens at hand, K > 1 the last depth for K steps (see `MTPChain`).
            state: (batch, time, hidden) to begin with instead of the embedding, in a pipeline (`model.pipeline`).
            experts: (batch, time, MoE layers, K) integers, those to take in place of the routers' choices, negative
                where a router chooses. Their weights come from the scores of now.
        """
        time, device = input_ids.shape[1], input_ids.device
        positions = torch.arange(time, device=device)[None] if cache is None else cache.begin(*input_ids.shape)
        rope = self.rotary(positions if position_ids is None else position_ids)
        token_mask = None if segment_ids is None else segment_ids >= 0

        embedding = self.embed(input_ids)
        state = embedding if state is None else state
        packed = (segment_ids, segment_ends, state, self.config)
        mask = packed_mask(*packed) if cache is None else cache.mask(time)
        routings, replayed = [], iter(() if experts is None else experts.unbind(2))
        for layer in self.model.layers:
            chosen = next(replayed, None) if layer.is_moe else None
            state, routing = self._run(layer, state, rope, mask, cache, token_mask, None, chosen)
            routings.append(routing)
        chain = self.mtp(state, embedding, rope, mask, segment_ids, mtp, self._run) if mtp else MTPOutput()

        seen: list[Routing] = [routing for routing in (*routings, *chain.routings) if routing is not None]
        return Output(
            hidden=self.model.norm(state),
            state=state,
            head=self.lm_head.weight,
            mtp_hidden=chain.hidden,
            mtp_unrolled=chain.unrolled,
            counts=torch.stack([routing.counts for routing in seen]) if seen else None,
            balance_loss=torch.stack([routing.balance_loss for routing in seen]).sum(0) if seen else None,
        )

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the start of the residual stream, (batch, time, hidden)."""
        # A bfloat16 residual stream, as DeepSeek-V3's; autocast alone would carry it in float32.
        return autocast(self.model.embed_tokens(input_ids))

    def routers(self) -> list[Router]:
        """Return the routers in the order of `Output.counts`."""
        return [layer.mlp.gate for layer in [*self.model.layers, *self.mtp] if layer.is_moe]

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Return prompt and completion, (batch, time + new); for the options see `model.decoding.generate.generate`."""
        return resolve_name("model.decoding.generate:generate")(self, input_ids, **options)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *options: Any, **named: Any) -> MiniDeepSeek:
        """Open a Hugging Face folder of a `deepseek_v3` model; see `model.checkpoint.folder.load_pretrained`."""
        return load_pretrained(cls, folder, *options, **named)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, the weights and generation_config.json; see `model.checkpoint.folder.save_pretrained`."""
        save_pretrained(self, folder)

    def _run(self, layer: nn.Module, *inputs: Any) -> tuple[Tensor, Routing | None]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=self.has_dropout)
        return layer(*inputs)

    def _initialise(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding, Router)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Experts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
