"""First weights of a model that is cut: it begins on the meta device, and each rank keeps its share of each weight.

One process draws its first weights from one generator, one after the other. So does each rank here, or reads them one
after the other from a checkpoint: a whole weight is there until the rank has taken its share of it, and no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from LMConfig import LMConfig
from model import MiniDeepSeek
from model.checkpoint.folder import TIED, describe, released_name, released_views
from model.checkpoint.weight_files import WeightFiles
from training.parallel.rank_checks import checksum
from training.parallel.saved import meta_state, read

if TYPE_CHECKING:
    from training.parallel.sharding import Shards

Keep = Callable[[Tensor, Tensor], None]  # called with a parameter on the meta device, and what is drawn for it
DRAWS = {torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default}
CONSTANTS = {torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar}


class Deferred(MiniDeepSeek):
    """A model whose weights have no memory yet, but for those that are never drawn, such as norms.

    Attributes: put_in: puts the first weights into shards, by all ranks alike. Returns the checksum of each whole one.
    files: that hold them, where they are read.
    """

    def __init__(
        self, config: LMConfig, put_in: Callable[[Shards], dict[str, Tensor]], files: WeightFiles | None = None
    ) -> None:
        with EmptyOnMeta():
            super().__init__(config)
        self.put_in, self.files = put_in, files

    @classmethod
    def drawn(cls, config: LMConfig) -> Deferred:
        """Return a model that will have the weights that `MiniDeepSeek(config)` would have now."""
        state = torch.get_rng_state()
        return cls(config, lambda shards: draw(config, state, shards))

    @classmethod
    def read(cls, folder: str | Path, adapt: Callable[[LMConfig], LMConfig]) -> Deferred:
        """Return a model that will have the weights of `MiniDeepSeek.from_pretrained(folder, adapt=adapt)`."""
        config, files = describe(Path(folder), adapt)
        return cls(config, lambda shards: read(files, config, shards), files)

    def stored(self) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """Yield each weight of the files by its name in our state dict, in the order of names, in pieces of its bytes.

        What lies there as one experts' matrices is one weight here, and comes expert by expert.
        """
        state = meta_state(self.config)
        for name in sorted(state):
            yield name, self._pieces(name, state[name])

    def whole(self, name: str, weight: Tensor) -> Tensor:
        """Read a weight of the files, float32. weight: of its shape."""
        return torch.cat([piece.flatten() for piece in self._pieces(name, weight)]).view(weight.shape)

    def _pieces(self, name: str, weight: Tensor) -> Iterator[Tensor]:
        files, tied = self.files, dict(zip(TIED, TIED[::-1], strict=True))
        stored = released_name(name, self.config)
        stored = stored if stored in files.names else tied.get(stored, stored)
        pieces = [stored] if stored in files.names else released_views({name: weight}, self.config)
        return (files[piece].float() for piece in pieces)

    @contextmanager
    def extended(self) -> Iterator[None]:
        """What modules of one's own draw within is what they would draw beside the whole model, and it has memory.

        What they make of one of its weights (DoRA its norms) they make of the weight that is read for it.
        """
        names = {p: name for name, p in self.named_parameters()}
        draw_each(self.config, lambda *_: None)  # the generator is then where one process's is
        with KeptInMemory(lambda p: self.whole(names[p], p)):
            yield


class EmptyOnMeta(TorchFunctionMode):
    """Memory that is yet to be filled is on the meta device; what is computed is not."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class KeptInMemory(TorchDispatchMode):
    """What would go to the meta device, where the weights beside it are, stays where it is; one of them is read."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        """read: called with a weight on the meta device."""
        super().__init__()
        self._read = read

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            to_meta = torch.device(kwargs["device"]).type == "meta"
            if args[0].is_meta and not to_meta:
                return self._read(args[0])
            kwargs["device"] = args[0].device if to_meta else kwargs["device"]
        return func(*args, **kwargs)


class Drawing(TorchDispatchMode):
    """What is drawn in place for a tensor on the meta device is drawn for one of its size, which `keep` then gets."""

    def __init__(self, keep: Keep) -> None:
        super().__init__()
        self._keep = keep

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in DRAWS | CONSTANTS and args[0].is_meta:
            whole = torch.empty(args[0].shape, dtype=args[0].dtype)
            self._keep(args[0], func(whole, *args[1:], **(kwargs or {})))
        return func(*args, **(kwargs or {}))


class _Uninitialised(MiniDeepSeek):
    """As the constructors of its layers leave it, which draw too."""

    def _initialise(self, module: nn.Module) -> None:
        pass


def draw(config: LMConfig, state: Tensor, shards: Shards) -> dict[str, Tensor]:
    """Put in what `MiniDeepSeek(config)` draws where the generator is at `state`. Returns checksums."""
    before, sums = torch.get_rng_state(), {}
    torch.set_rng_state(state)

    def keep(name: str, weight: Tensor) -> None:
        sums[name] = checksum(weight)
        shards.load({name: weight})

    draw_each(config, keep)
    torch.set_rng_state(before)
    return sums


def draw_each(config: LMConfig, keep: Callable[[str, Tensor], None]) -> None:
    """Draw what `MiniDeepSeek(config)` draws; `keep` is called with names and weights."""
    apart = replace(config, tie_word_embeddings=False)  # a head is drawn before it is tied
    with EmptyOnMeta(), Drawing(lambda *_: None):
        whole = _Uninitialised(apart)
    names = {p: name for name, p in whole.named_parameters()}
    with Drawing(lambda p, weight: keep(names[p], weight)):
        whole.apply(lambda module: MiniDeepSeek._initialise(whole, module))


def with_memory(model: MiniDeepSeek, device: torch.device) -> MiniDeepSeek:
    """Return the model on a device, with memory, not yet filled, for what has had none."""
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    if model.config.tie_word_embeddings:  # which memory for each of them has untied
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
