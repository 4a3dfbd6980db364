"""Which part of the network each pipeline rank holds: layers cut into chunks, in one line or folded into a V."""

from __future__ import annotations

from dataclasses import dataclass, replace

from LMConfig import LMConfig
from model.costs import attention_parameters


@dataclass(frozen=True)
class Part:
    """What one pipeline rank holds.

    Attributes:
        layers: indices, those of MTP counted on from the last.
        weights: parameters but the routed experts'; experts: those of all routed experts of these layers.
        flops: of training one token (forward and backward), attention at the sequence length included.
    """

    layers: tuple[int, ...]
    weights: int
    experts: int
    flops: int

    def __add__(self, other: Part) -> Part:
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("weights", "experts", "flops")}
        return replace(self, layers=self.layers + other.layers, **sums)


def chunk_sizes(layers: int, chunks: int) -> list[int]:
    """Cut so many layers evenly. The first chunk also has the embedding, the last one the head: they get fewer."""
    least, more = divmod(layers, chunks)
    by_need = sorted(range(chunks), key=lambda chunk: chunk in (0, chunks - 1))
    return [least + (chunk in by_need[:more]) for chunk in range(chunks)]


def stage_layers(layers: int, depths: int, stages: int) -> list[range]:
    """Return the main layers of each stage; the MTP chain of so many depths, on the last one, counts as layers too."""
    sizes = chunk_sizes(layers + depths, stages)
    sizes[-1] -= depths
    ends = [sum(sizes[: place + 1]) for place in range(stages)]
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def parts(config: LMConfig, pp: int, folded: bool, time: int) -> list[Part]:
    """Return what each of `pp` ranks holds.

    folded: rank r has the chunks r and 2 pp - 1 - r of 2 pp, a V, in which the first rank has the loss too; or chunk r
    of pp. time: sequence length.
    """
    chunks, first = [], 0
    count = 2 * pp if folded else pp
    for size in chunk_sizes(config.num_hidden_layers + config.num_nextn_predict_layers, count):
        chunks.append(_chunk(config, range(first, first + size), not chunks, len(chunks) == count - 1, time))
        first += size
    if not config.tie_word_embeddings:
        chunks[-1] += Part((), shared_by_ends(config, pp, folded, pp - 1), 0, 0)
    elif folded:  # one matrix, on the rank that has both ends
        chunks[-1] += Part((), -config.vocab_size * config.hidden_size, 0, 0)
    return [chunks[rank] + chunks[2 * pp - 1 - rank] if folded else chunks[rank] for rank in range(pp)]


def shared_by_ends(config: LMConfig, pp: int, folded: bool, rank: int) -> int:
    """Return how many weights a rank has in common with the other end of the line: the embedding, for MTP or a head."""
    takes = config.num_nextn_predict_layers > 0 or config.tie_word_embeddings
    return config.vocab_size * config.hidden_size if takes and pp > 1 and not folded and rank in (0, pp - 1) else 0


def _chunk(config: LMConfig, layers: range, is_first: bool, is_last: bool, time: int) -> Part:
    hidden, depths = config.hidden_size, config.num_nextn_predict_layers
    embedding = config.vocab_size * hidden
    part = Part(tuple(layers), 0, 0, 0)
    for index in layers:
        part += _layer(config, index, time)
    if is_first:
        part += Part((), embedding, 0, 0)
    if is_last:  # the final norm; the head once for the main model and once for each MTP depth
        head = 0 if config.tie_word_embeddings and is_first else embedding
        part += Part((), head + hidden, 0, 6 * (1 + depths) * embedding)
    return part


def _layer(config: LMConfig, index: int, time: int) -> Part:
    hidden = config.hidden_size
    expert = 3 * hidden * config.moe_intermediate_size
    weights, experts = attention_parameters(config) + 2 * hidden, 0
    if index >= config.num_hidden_layers:
        weights += 2 * hidden * hidden + 3 * hidden  # eh_proj; enorm, hnorm and the head's norm
    if config.is_moe_layer(index):
        weights += config.n_routed_experts * hidden + config.n_shared_experts * expert
        experts = config.n_routed_experts * expert
    else:
        weights += 3 * hidden * config.intermediate_size
    chosen = config.num_experts_per_tok * expert if experts else 0
    attention = 3 * config.num_attention_heads * time * (config.qk_head_dim + config.v_head_dim)  # causal: half of it
    return Part((), weights, experts, 6 * (weights + chosen) + attention)
