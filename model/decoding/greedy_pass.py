"""A greedy pass of speculative decoding, drafts and verification, as one call of decode.c."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.cache import LatentCache
from model.decoding import native
from model.decoding.drafter import drafter
from model.decoding.stepper import Stepper, draft, stepper
from model.kernels.compiled import floats, integers
from model.kernels.structs import Speculation
from model.transformer import MiniDeepSeek


class GreedyPass:
    """Passes over one prompt with one MTP layer; the positions of the cache are counted here from now on.

    Args:
        main, mtp: what runs the main model and the MTP layer, over one cache that has room for `most` drafts.
        tokens: the known ones; the main model has read all but the last, the MTP layer has met all but the last two.
        state: (1, 1, hidden) of the main model at the last position that it has read.
        most: drafts a pass; likely: a draft is continued while all of it comes true with this probability.
    """

    def __init__(self, main: Stepper, mtp: Stepper, tokens: list[int], state: Tensor, most: int, likely: float) -> None:
        main.prepare(most + 1)
        mtp.prepare(most + 1)
        self.library, self.known, self.fresh = main.library, len(tokens), 1
        self.line = (ctypes.c_int64 * (main.cache.max_length + 1))(*tokens)
        room = {"states": most + 1, "x": 2 * (most + 1)}
        tensors = {name: floats(rows, main.config.hidden_size) for name, rows in room.items()}
        tensors["states"][0] = state[0, 0]
        tensors |= {"logits": floats(most + 1, main.ends.vocab), "confidence": floats(1)}
        tensors["choice"] = integers(most + 1)
        structs = {"shape": main.shape, "scratch": main.scratch, "ends": main.ends, "mtp_ends": mtp.ends}
        structs |= {"layers": main.addresses, "mtp": mtp.addresses, "line": self.line}
        self.room = main, mtp, tensors  # what the addresses below belong to
        self.given = Speculation(
            count=len(main.layers),
            most=most,
            capacity=main.cache.max_length,
            likely=likely,
            threads=main.threads,
            **{name: ctypes.addressof(struct) for name, struct in structs.items()},
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )

    def run(self) -> tuple[list[int], int]:
        """The next tokens: the drafts that hold, and one more; and how many drafts there were."""
        drafted, before = ctypes.c_int64(), self.known
        given = ctypes.byref(self.given), before, self.fresh, ctypes.byref(drafted)
        self.known = self.library.speculate(*given)
        self.fresh = self.known - before
        return self.line[before : self.known], drafted.value


def greedy_pass(
    model: MiniDeepSeek, cache: LatentCache, tokens: list[int], states: Tensor, most: int, likely: float
) -> GreedyPass | None:
    """What makes greedy passes in C, or None where that cannot be: see `stepper`, and with several MTP layers.

    states: (1, time, hidden) of the main model at all known tokens but the last; the MTP layer reads them here.
    """
    if len(model.mtp) != 1:
        return None
    few = torch.zeros(1, most + 1, dtype=torch.int64, device=states.device)
    main = stepper(model, model.model.layers, model.model.norm, few, cache)
    mtp = stepper(model, model.mtp, model.mtp[0].shared_head.norm, few, cache)
    if main is None or mtp is None or main.library is not mtp.library:
        return None
    if states.shape[1] > 1:
        draft(model, states[:, :-1], torch.tensor([tokens[1:-1]]), 1, cache)
    return GreedyPass(main, _light(model, mtp, cache), tokens, states[:, -1:], most, likely)


def _light(model: MiniDeepSeek, mtp: Stepper, cache: LatentCache) -> Stepper:
    """The MTP layer over the same cache with weights in 8 bits, where the same library reads both."""
    if native.types(model.mtp)[0] != native.types(model.mtp)[1]:  # without matrices of its own: the type of its norms
        return mtp
    light = drafter(model)
    return Stepper(model, [light.layer], light.layer.shared_head.norm, cache, light.head)
