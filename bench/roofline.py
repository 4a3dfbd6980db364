"""What one H100 and eight of them could do at best: FLOPs and bytes a token, and the times that follow.

python bench/roofline.py [--presets 64m 1b-moe deepseek-v3] [--tokens 32768] [--length 4096] [--prompt 4096]

Nothing is measured: these are bounds with named assumptions, written as Markdown tables. A time is the larger of
FLOPs / (attained share x peak) and bytes / (attained share x bandwidth), which presumes that both overlap.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from LMConfig import LMConfig
from model.costs import Costs, activation_numbers, count, human

BF16, FP32 = 2, 4  # bytes
STATE_BYTES = 4 * FP32  # a weight in training: itself, its gradient and AdamW's two moments
UPDATE_BYTES = 10 * FP32  # AdamW reads 4 and writes 3 of them, clipping reads the gradient twice and writes it once
PASSES = 3  # forward, and backward for the input and for the weight


@dataclass(frozen=True)
class Machine:
    """Accelerators of one node.

    Attributes:
        flops: dense bf16 FLOP/s of one; bandwidth, memory: bytes/s and bytes of its HBM.
        link: bytes/s that one sends, and at the same time receives, over NVLink.
        compute_share, memory_share: of `flops`, and of `bandwidth` and `link`, that well-written programs attain.
    """

    count: int = 1
    flops: float = 989e12
    bandwidth: float = 3.35e12
    memory: float = 80e9
    link: float = 450e9
    compute_share: float = 0.4
    memory_share: float = 0.8

    def seconds(self, flops: float, moved: float) -> float:
        """Of work that is spread evenly over all of them; `moved`: bytes."""
        seconds = flops / (self.compute_share * self.flops), moved / (self.memory_share * self.bandwidth)
        return max(seconds) / self.count

    def all_reduce(self, size: float) -> float:
        """Return seconds of a ring: each sends and receives 2 (n - 1) / n of `size` bytes."""
        return 2 * (self.count - 1) / self.count * size / (self.memory_share * self.link)


@dataclass(frozen=True)
class Network:
    """What a configuration computes and moves. Numbers of weights unless said otherwise; MTP takes part in training."""

    config: LMConfig
    costs: Costs
    length: int

    @staticmethod
    def of(config: LMConfig, length: int) -> Network:
        """length: of the sequences, which attention's FLOPs depend on."""
        return Network(config, count(config, length), length)

    @property
    def weights(self) -> int:
        return self.costs.total + self.costs.mtp

    @property
    def expert(self) -> int:
        """Gate, up and down projection of one routed expert."""
        return 3 * self.config.hidden_size * self.config.moe_intermediate_size

    @property
    def lookup(self) -> int:
        """The embedding, of which a token reads one row, where the head is another matrix."""
        return 0 if self.config.tie_word_embeddings else self.config.vocab_size * self.config.hidden_size

    @property
    def moe_layers(self) -> int:
        return self.config.num_hidden_layers - self.config.first_k_dense_replace

    def distinct_experts(self, batch: int) -> float:
        """Of one layer, that `batch` tokens choose, were all equally likely: E (1 - (1 - K/E)^batch)."""
        experts = self.config.n_routed_experts
        return experts * (1 - (1 - self.config.num_experts_per_tok / experts) ** batch)

    def read_weights(self, batch: int) -> float:
        """That one step of decoding reads: all but the embedding, of the experts only those chosen."""
        always = self.costs.activated - self.lookup - self.moe_layers * self.config.num_experts_per_tok * self.expert
        return always + self.moe_layers * self.distinct_experts(batch) * self.expert

    def decoding_flops(self, past: int) -> float:
        """Return those of one token after `past` others, absorbed: 2 a weight, and twice each head's product."""
        config = self.config
        latent = 2 * config.kv_lora_rank + config.qk_rope_head_dim
        attention = 2 * config.num_hidden_layers * config.num_attention_heads * past * latent
        return 2 * (self.costs.activated - self.lookup) + attention

    def decoding_bytes(self, batch: int, past: int) -> float:
        """Weights once for all rows, the latents of each row, all in bf16."""
        return BF16 * self.read_weights(batch) + batch * past * self.costs.cache_bytes

    def prefill_flops(self) -> float:
        """Return those of one token of a prompt: a third of training's, without MTP."""
        return count(replace(self.config, num_nextn_predict_layers=0), self.length).flops / PASSES

    def activation_bytes(self) -> float:
        """Of one token in training: each product reads its input and writes its output in bf16, in each of 3 passes;
        norms, rotations and activations between them move as much again."""
        config = self.config
        numbers = activation_numbers(config) + config.hidden_size + config.vocab_size
        return 2 * PASSES * BF16 * numbers


def training(networks: dict[str, Network], machines: list[Machine], tokens: int) -> list[list[str]]:
    """Return a table of training steps: `tokens`, weights and optimiser on each accelerator, gradients summed."""
    rows = [["preset", "GPUs", "FLOPs/token", "bytes/token", "step", "of it update", "tokens/s", "state"]]
    for (name, network), machine in product(networks.items(), machines):
        one, weights = replace(machine, count=1), network.weights
        # The weights are read in each pass, and cast from float32 once.
        moved = tokens * network.activation_bytes() + weights * (PASSES * BF16 + FP32 + BF16 + FP32)
        work = one.seconds(tokens * network.costs.flops, moved)
        update = one.seconds(0, UPDATE_BYTES * weights)
        # Two thirds of the work are the backward pass, under which the sum of the gradients hides.
        step = work + update + max(0.0, machine.all_reduce(FP32 * weights) - work * 2 / 3)
        rows.append(
            [name, str(machine.count), human(network.costs.flops), human(network.activation_bytes(), "B"),
             milliseconds(step), milliseconds(update), human(machine.count * tokens / step),
             fits(STATE_BYTES * weights, one)]
        )  # fmt: skip
    return rows


def decoding(networks: dict[str, Network], machines: list[Machine], past: int, batches: list[int]) -> list[list[str]]:
    """Return a table of decoding steps with `past` tokens in the cache, weights spread over the accelerators."""
    rows = [["preset", "GPUs", "batch", "experts read a layer", "weights", "cache", "step", "tokens/s", "bound by",
             "weights in bf16"]]  # fmt: skip
    for (name, network), machine, batch in product(networks.items(), machines, batches):
        moved, flops = network.decoding_bytes(batch, past), batch * network.decoding_flops(past)
        step = machine.seconds(flops, moved)
        bound = "bandwidth" if step == machine.seconds(0, moved) else "FLOPs"
        rows.append(
            [name, str(machine.count), str(batch), f"{network.distinct_experts(batch):.1f}",
             human(BF16 * network.read_weights(batch), "B"), human(batch * past * network.costs.cache_bytes, "B"),
             milliseconds(step), human(batch / step), bound,
             fits(BF16 * network.costs.total, machine, machine.count)]
        )  # fmt: skip
    return rows


def fits(size: float, machine: Machine, over: int = 1) -> str:
    """Return whether it leaves a fifth of the memory free, and if not how many accelerators would."""
    room = 0.8 * machine.memory
    return human(size, "B") if size <= over * room else f"{human(size, 'B')}: too much, {ceil(size / room)} GPUs"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def markdown(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["64m", "1b-moe", "deepseek-v3"])
    parser.add_argument("--tokens", type=int, default=32768, help="of a training step on each GPU")
    parser.add_argument("--length", type=int, default=4096, help="of the sequences")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens before those that are decoded")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128])
    options = parser.parse_args()
    networks = {name: Network.of(LMConfig.preset(name), options.length) for name in options.presets}
    machines = [Machine(1), Machine(8)]
    one = machines[0]
    print(
        f"Assumed of a GPU: {one.flops / 1e12:,.0f} TFLOP/s bf16, of which {one.compute_share:.0%} attained; "
        f"{one.bandwidth / 1e12:.2f} TB/s HBM and {one.link / 1e9:.0f} GB/s NVLink each way, {one.memory_share:.0%} "
        f"attained; {one.memory / 1e9:.0f} GB.\n"
    )
    print(f"Training, {options.tokens:,} tokens a GPU and step in sequences of {options.length:,}:\n")
    print(markdown(training(networks, machines, options.tokens)))
    print(f"\nDecoding after {options.prompt:,} tokens:\n")
    print(markdown(decoding(networks, machines, options.prompt, options.batches)))


if __name__ == "__main__":
    main()
