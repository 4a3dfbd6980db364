"""How ranks share the work: `--dist.*` of each stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from errors import UserError, check_least


@dataclass
class DistSettings:
    """How ranks work together.

    Args:
        timeout: seconds to wait for another rank before the run ends.
        check_every: steps between checks that all ranks hold the same weights to the bit; 0: none.
        gradients: fp32 or bf16: the type in which they are exchanged between ranks; bf16 moves half the bytes.
    """

    timeout: float = 1800.0
    check_every: int = 100
    gradients: str = "fp32"

    def __post_init__(self) -> None:
        if self.gradients not in ("fp32", "bf16"):
            raise UserError(f"--dist.gradients {self.gradients}: one of fp32, bf16")
        if self.timeout <= 0:
            raise UserError(f"--dist.timeout {self.timeout:g}: must be positive")
        check_least(0, **{"dist.check_every": self.check_every})

    def cuts(self, world: int) -> bool:
        """Return whether each of `world` ranks holds less than the whole."""
        return False


@dataclass
class CutSettings(DistSettings):
    """How ranks work together, and what is cut among them.

    Args:
        zero: 0: each rank holds all weights, gradients and optimiser state; 1: a share of the optimiser state, with its
            weights in float32; 3: of gradients and weights too.
        ep: ranks that the experts of a layer are spread over; more than 1 cuts the optimiser state too.
    """

    zero: int = 0
    ep: int = 1

    pp: ClassVar[int] = 1  # ranks that the layers are spread over

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(1, **{"dist.ep": self.ep})
        if self.zero not in (0, 1, 3):
            raise UserError(f"--dist.zero {self.zero}: one of 0, 1, 3")

    def cuts(self, world: int) -> bool:
        """Return whether each of `world` ranks holds less than the whole."""
        return self.ep > 1 or (self.zero > 0 and world > 1)


@dataclass
class ShardSettings(CutSettings):
    """How ranks work together, what is cut among them, and how layers are.

    Args:
        pp: ranks that the layers are spread over, a pipeline; more than 1 cuts the optimiser state too.
        schedule: of the pipeline: 1f1b, zbv or dualpipev.
    """

    pp: int = 1
    schedule: str = "1f1b"

    SCHEDULES: ClassVar[tuple[str, ...]] = ("1f1b", "zbv", "dualpipev")
    FOLDED: ClassVar[tuple[str, ...]] = ("zbv", "dualpipev")  # into a V: a rank has two stages

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(1, **{"dist.pp": self.pp})
        if self.schedule not in self.SCHEDULES:
            raise UserError(f"--dist.schedule {self.schedule}: one of {', '.join(self.SCHEDULES)}")

    @property
    def stages(self) -> int:
        """Return those of a pipeline."""
        return self.pp * (2 if self.schedule in self.FOLDED else 1)

    def cuts(self, world: int) -> bool:
        return self.pp > 1 or super().cuts(world)
