"""Generation: prefill once, then one token a step from the latent cache; speculative with the MTP chain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errors import UserError
from model.cache import LatentCache, cache_dtype, send
from model.decoding.runner import runner_for
from model.decoding.sampling import Sampling

if TYPE_CHECKING:
    from model.transformer import MiniDeepSeek


def generate(
    model: MiniDeepSeek,
    input_ids: Tensor,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | Iterable[int] | None = None,
    speculative: bool = False,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    draft_tokens: int = 0,
) -> Tensor:
    """Return prompt and completion of every row, (batch, time + new), filled up with the stop token.

    Args:
        input_ids: (batch, time) prompts, shorter ones padded on the left (any token; `attention_mask` says where).
        max_new_tokens: at most so many; fewer when every row has met a stop token.
        eos_token_id: one or several stop tokens; None never stops early.
        speculative: draft with the MTP chain and verify with one pass: the same greedy tokens, or sampled ones of the
            same distribution, in fewer passes. One prompt, no repetition penalty.
        seed: of the sampling; None draws on torch's global generator.
        attention_mask: (batch, time) 1 for tokens, 0 for left padding.
        draft_tokens: the most drafts a speculative pass; 0 means one for each MTP layer.
    """
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    stop = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id or ())
    if speculative:
        check_speculative(model, input_ids, sampling)
        if attention_mask is not None and not attention_mask.all():
            raise UserError("speculative generation: of one prompt without padding only; leave the mask out")
        drafted = resolve_name("model.decoding.speculative:stream_speculative")
        tokens = drafted(model, input_ids, max_new_tokens, stop, None, draft_tokens, sampling, seed)
        return torch.cat((input_ids, input_ids.new_tensor(list(tokens)).view(1, -1)), dim=1)
    steps = list(stream(model, input_ids, max_new_tokens, sampling, stop, seed, attention_mask))
    new = send(torch.stack(steps, dim=1), input_ids.device) if steps else input_ids[:, :0]
    return torch.cat((input_ids, new), dim=1)


def check_speculative(model: MiniDeepSeek, input_ids: Tensor, sampling: Sampling) -> None:
    """Raises UserError for what speculative generation cannot do."""
    if sampling.repetition_penalty != 1 or input_ids.shape[0] != 1:
        raise UserError("speculative generation: without repetition penalty and for a single prompt only")
    if not model.mtp:
        raise UserError("speculative generation: this checkpoint has no MTP layer; leave --speculative out")


@torch.inference_mode()
def stream(
    model: MiniDeepSeek,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    stop: tuple[int, ...] = (),
    seed: int | None = None,
    attention_mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, (batch,) on the host, step by step; see `generate`."""
    batch, time = input_ids.shape
    padding = _left_padding(attention_mask)
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    # One position less than all: the last token is never read.
    cache = LatentCache(model.config, batch, time + max_new_tokens, cache_dtype(model), input_ids.device, padding)
    runner = runner_for(model, cache)
    fill = stop[0] if stop else 0
    running = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    unfinished = torch.ones(batch, dtype=torch.bool)  # the same on the host
    # Padding is not text that could be repeated: the row's own last token stands in for it.
    ids, seen = input_ids, input_ids if padding is None else input_ids.where(attention_mask.bool(), input_ids[:, -1:])
    for count in range(1, max_new_tokens + 1):
        if count == 1:
            logits = runner.prefill(ids)
            choice = logits.argmax(-1)
        else:
            step = runner.step(ids)
            logits, choice = step.logits[:, -1], step.choice[:, -1]
        plain = sampling.temperature == 0 and sampling.repetition_penalty == 1
        chosen = choice if plain else sampling.choose(logits, seen, generator)
        chosen = torch.where(running, chosen, torch.full_like(chosen, fill))
        tokens = chosen.cpu()  # the one wait for the device in a step
        yield tokens
        for token in stop:
            running, unfinished = running & (chosen != token), unfinished & (tokens != token)
        if stop and not unfinished.any():
            return
        ids = chosen.unsqueeze(1)
        if sampling.repetition_penalty != 1 and count < max_new_tokens:
            seen = torch.cat((seen, ids), dim=1)


def _left_padding(attention_mask: Tensor | None) -> Tensor | None:
    """(batch,) padding positions on the left of each row, or None when there are none."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    padding = attention_mask.shape[1] - attention_mask.sum(1)
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    if not torch.equal(attention_mask.bool(), positions[None] >= padding[:, None]):
        raise UserError("attention_mask: padding must be on the left of each row, before all of its tokens")
    return padding
