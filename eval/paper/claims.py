"""The claims: each with what the paper says, the arms that it needs, and what is measured of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from eval.paper import measures
from eval.paper.arms import BASE
from eval.paper.bench import Bench
from eval.paper.measures import SWEPT, Result


@dataclass(frozen=True)
class Claim:
    """A claim of a paper. Attributes: paper: what it says, and where; arms: that must be trained."""

    name: str
    title: str
    paper: str
    arms: tuple[str, ...]
    measure: Callable[[Bench], Result]


CLAIMS = (
    Claim(
        "balance",
        "Balancing by a bias beats the auxiliary loss, and without either experts collapse",
        "DeepSeek-V3, Table 5 and section 4.5.2: better on most benchmarks",
        (BASE, "balance-aux", "balance-none"),
        measures.balance,
    ),
    Claim(
        "scope",
        "Batch-wise balance lets experts specialise more than sequence-wise balance",
        "DeepSeek-V3, section 4.5.3 and Figure 9: validation loss 2.258 sequence-wise, 2.253 batch-wise, at 1B",
        (BASE, "balance-aux", "balance-aux-batch"),
        measures.scope,
    ),
    Claim(
        "mtp",
        "Multi-token prediction helps the main model",
        "DeepSeek-V3, Table 4: better on most benchmarks, at equal tokens",
        (BASE, "mtp", "base-longer"),
        measures.mtp,
    ),
    Claim(
        "acceptance",
        "85 to 90 % of second tokens are accepted",
        "DeepSeek-V3, section 5.4.3: 85 to 90 % across topics, 1.8 times the tokens a second",
        ("mtp",),
        measures.acceptance,
    ),
    Claim(
        "attention",
        "MLA is better than MHA and GQA, with a smaller cache",
        "DeepSeek-V2, Tables 8 and 9: MHA beats GQA and MQA; MLA beats MHA with 4 to 14 % of its cache",
        (BASE, "mha", "gqa"),
        measures.attention,
    ),
    Claim(
        "fp8",
        "FP8 training stays within 0.25 % of the loss in bf16",
        "DeepSeek-V3, section 3.3 and Appendix B.1: below 0.25 %",
        (BASE, "fp8"),
        measures.fp8,
    ),
    Claim(
        "experts",
        "Fine-grained and shared experts are better",
        "DeepSeekMoE, Figures 3 and 4",
        (BASE, "coarse", "unshared"),
        measures.experts,
    ),
    Claim(
        "dense",
        "A mixture of experts beats a dense model of equal active FLOPs",
        "DeepSeekMoE, Table 1; DeepSeek-V2, Figure 1",
        (BASE, "dense", "dense-longer"),
        measures.dense,
    ),
    Claim(
        "context",
        "YaRN in two phases finds needles at 16 times the length",
        "DeepSeek-V3, Figure 8: at all depths up to 128K tokens",
        (BASE,),
        measures.context,
    ),
    Claim(
        "sweeps",
        "Speed of the bias, weight of the sequence-wise loss, scale and group limit: the paper's values beside others",
        "DeepSeek-V3, section 4.2: speed 0.001, weight 0.0001, scale 2.5, 4 of 8 groups",
        (BASE, *SWEPT),
        measures.sweeps,
    ),
    Claim(
        "r1",
        "A cold start helps RL, and a distilled student beats RL of a small model",
        "DeepSeek-R1, sections 2 to 4",
        (),
        measures.reasoning,
    ),
)
