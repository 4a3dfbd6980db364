"""A checkpoint that ranks write together: an ordinary Hugging Face folder, of which no rank ever holds everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from errors import DamagedCheckpoint, waiting
from LMConfig import LMConfig, write_json
from model import MiniDeepSeek
from model.checkpoint.folder import (
    STACKED,
    TIED,
    describe,
    fill,
    is_mtp,
    mtp_copies,
    released_name,
    released_views,
    single_experts,
    write_config,
    write_weights,
)
from model.checkpoint.weight_files import MTP, WEIGHTS, WeightFiles
from training.parallel.rank_checks import checksum
from training.parallel.ranks import Ranks
from training.run.resume import same_shape

if TYPE_CHECKING:
    from training.parallel.sharding import Sharded, Shards

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

    A model of one file is written by the main rank, with its MTP layers in another.
    """

    def __init__(self, sharded: Sharded) -> None:
        self.model, self.shards = sharded.model, sharded.shards
        self._files = files_of(self.model.config)
        self._is_split = WEIGHTS not in self._files
        world = dist.get_world_size() if self._is_split else 1
        self._writers = {name: place % world for place, names in enumerate(self._files.values()) for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """Return whole ones that this rank is to write; called by all ranks together."""
        return self.shards.gather(self.shards.state_dict(), self._writers)

    def write(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Write the files of these, and on the main rank what tells of all of them."""
        config, first = self.model.config, next(iter(self._files))
        for file, names in self._files.items():
            here = released_views({name: tensors[name] for name in names if name in tensors}, config)
            if here and file == (first if self._is_split else MTP):
                here |= {name: tensors[original] for name, original in mtp_copies(config).items()}
            if here:
                write_weights({file: _copies(here)}, folder)
        if dist.get_rank() == 0:
            write_config(config, folder)
            if self._is_split:
                write_json(index_of(self._files, config), folder / f"{WEIGHTS}.index.json")

    def load(self, folder: Path) -> None:
        """Take this rank's share of those of a folder, read one after the other."""
        config, files = describe(folder, lambda config: config)
        same_shape(folder, config, self.model.config)
        with waiting(f"reading {folder}"):
            read(files, config, self.shards)


def read(files: WeightFiles, config: LMConfig, shards: Shards) -> dict[str, Tensor]:
    """Put in the weights of a folder. Returns checksums. Raises `DamagedCheckpoint`, as `model.checkpoint.folder.fill`.

    config: of the model; the folder has all of its weights.
    """
    places: dict[str, tuple[Tensor, slice]] = {}
    for weight, share in shards.places().items():
        name, rows = released_name(weight.replace(".base_layer", ""), config), shards.rows(weight)  # under adapters
        places[name] = share, rows
        if STACKED.match(name):  # an expert is whole or not here
            places |= {one: (view, slice(None)) for one, view in single_experts(name, share, rows.start or 0).items()}
    if config.tie_word_embeddings:
        places |= {name: places[other] for name, other in zip(TIED, TIED[::-1], strict=True) if other in places}
    sums: dict[str, Tensor] = {}
    tied: list[Tensor] = []

    def kept() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in files:
            yield name, tensor  # and it fits
            sums[name] = checksum(tensor)
            if name not in places:
                continue
            place, rows = places[name]
            if config.tie_word_embeddings and name in TIED:
                tied.append(sums[name])
            place.copy_(tensor[rows] if tensor.dim() else tensor)

    with torch.device("meta"):
        whole = MiniDeepSeek(config)
    try:
        with torch.no_grad():
            fill(whole, kept())
        if len({int(one) for one in tied}) > 1:
            raise DamagedCheckpoint(
                f"{' and '.join(TIED)} differ, though config.json ties them; set its tie_word_embeddings to false"
            )
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(error if str(files.folder) in str(error) else f"{files.folder}: {error}") from None
    return sums


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors wants them."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def files_of(config: LMConfig) -> dict[str, list[str]]:
    """Return the weights, by their names in our state dict, of each file: those of MTP have one of their own.

    Where one is not enough for the others, all are in files with an index, embedding and head in the first one.
    """
    state = meta_state(config)
    mtp = [name for name in state if is_mtp(released_name(name, config), config)]
    parts, size = [[*TIED]], sum(state[name].nbytes for name in TIED)
    for name in [name for name in state if name not in (*mtp, *TIED)] + mtp:
        if name in mtp and len(parts) == 1:
            break
        if size + state[name].nbytes > LARGEST:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += state[name].nbytes
    if len(parts) == 1:
        return {WEIGHTS: parts[0]} | ({MTP: mtp} if mtp else {})
    return {SHARD.format(place, len(parts)): names for place, names in enumerate(parts, 1)}


def index_of(files: dict[str, list[str]], config: LMConfig) -> dict[str, object]:
    """Return the list of weights and their files, under the released names: MTP's and what these repeat too."""
    state, places, total = meta_state(config), {}, 0
    for place, (file, names) in enumerate(files.items()):
        views = released_views({name: state[name] for name in names}, config)
        views |= {} if place else {name: state[original] for name, original in mtp_copies(config).items()}
        places |= dict.fromkeys(views, file)
        total += sum(view.nbytes for view in views.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def meta_state(config: LMConfig) -> dict[str, Tensor]:
    """Return the state dict of a model of this config on the meta device."""
    with torch.device("meta"):
        return MiniDeepSeek(config).state_dict()
