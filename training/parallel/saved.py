"""A checkpoint that ranks write together: an ordinary Hugging Face folder, of which no rank ever holds everything."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from errors import waiting
from LMConfig import LMConfig, write_json
from model import MiniDeepSeek
from model.checkpoint.folder import (
    TIED,
    describe,
    is_mtp,
    mtp_copies,
    released_name,
    released_views,
    write_config,
    write_weights,
)
from model.checkpoint.weight_files import MTP, WEIGHTS
from training.parallel.initial import read
from training.parallel.ranks import Ranks
from training.run.resume import same_shape

if TYPE_CHECKING:
    from training.parallel.sharding import Sharded

LARGEST = 5 * 10**9  # bytes of a file of weights, unless a single one has more
SHARD = "model-{:05}-of-{:05}.safetensors"


class Agreement:
    """Has each rank do its part of something, in whichever thread, and then all know whether one has failed."""

    def __init__(self, ranks: Ranks) -> None:
        """Called by all ranks together: what is said among these threads has a group of its own."""
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=ranks.timeout))

    def __call__(self, work: Callable[[], object]) -> None:
        """Call `work`. Raises its `OSError`, or one that tells of another rank's."""
        mine: OSError | None = None
        try:
            work()
        except Exception as error:
            mine = error if isinstance(error, OSError) else OSError(str(error))
        said = None if mine is None else (mine.errno, f"rank {dist.get_rank()}: {mine.strerror or mine}")
        everywhere: list[tuple[int | None, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, said, self._group)
        if mine is not None:
            raise mine
        if failed := [one for one in everywhere if one is not None]:
            raise OSError(*failed[0])


class ShardedModel:
    """The weights of a checkpoint: files of at most `LARGEST` bytes, each gathered and written by one of the ranks.

    A model of one file is written by the main rank. It has the file of the MTP layers too.
    """

    def __init__(self, sharded: Sharded) -> None:
        self.model, self.shards = sharded.model, sharded.shards
        self._files = files_of(self.model.config)
        world = dist.get_world_size()
        self._writers = {name: place % world for place, (_, names) in enumerate(self._files) for name in names}
        self._mtp = {name for name in self._writers if name.startswith("mtp.")}

    def tensors(self) -> dict[str, Tensor]:
        """Return whole ones that this rank is to write; called by all ranks together."""
        return self.shards.gather(self.shards.state_dict(), self._writers)

    def write(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Write the files of these, and on the main rank what tells of all of them."""
        config = self.model.config
        for file, names in self._files:
            here = {name: tensors[name] for name in names if name in tensors and name not in self._mtp}
            if here:
                write_weights({file: _copies(released_views(here, config))}, folder)
        if here := {name: tensors[name] for name in self._mtp & tensors.keys()}:
            repeated = {name: tensors[original] for name, original in mtp_copies(config).items()}
            write_weights({MTP: _copies(released_views(here, config) | repeated)}, folder)
        if dist.get_rank() == 0:
            write_config(config, folder)
            if len(self._files) > 1:
                write_json(index_of(self._files, config), folder / f"{WEIGHTS}.index.json")

    def load(self, folder: Path) -> None:
        """Take this rank's share of those of a folder, read one after the other."""
        config, files = describe(folder, lambda config: config)
        same_shape(folder, config, self.model.config)
        with waiting(f"reading {folder}"):
            read(files, config, self.shards)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors wants them."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def files_of(config: LMConfig) -> list[tuple[str, list[str]]]:
    """Return names of files, and of the weights, as in our state dict, that each has.

    Embedding and head are in the first one, with the MTP layers, whose file repeats them.
    """
    state = _meta_state(config)
    mtp = [name for name in state if is_mtp(released_name(name, config), config)]
    parts, size = [[*TIED]], sum(state[name].nbytes for name in TIED)
    for name, tensor in state.items():
        if name in mtp or name in TIED:
            continue
        if size + tensor.nbytes > LARGEST:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensor.nbytes
    names = [SHARD.format(place, len(parts)) for place in range(1, len(parts) + 1)] if len(parts) > 1 else [WEIGHTS]
    parts[0] += mtp
    return list(zip(names, parts, strict=True))


def index_of(files: list[tuple[str, list[str]]], config: LMConfig) -> dict[str, object]:
    """Return the list of weights and their files, under the released names; MTP's are in a file that needs no list."""
    state, places, total = _meta_state(config), {}, 0
    for file, names in files:
        views = released_views({name: state[name] for name in names}, config)
        views = {name: view for name, view in views.items() if not is_mtp(name, config)}
        places |= dict.fromkeys(views, file)
        total += sum(view.nbytes for view in views.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _meta_state(config: LMConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return MiniDeepSeek(config).state_dict()
