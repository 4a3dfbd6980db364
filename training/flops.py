"""How many FLOPs a token of training takes as it is done: with what runs and what is trained at that moment."""

from __future__ import annotations

from dataclasses import replace

from model import MiniDeepSeek
from model.costs import count
from training.losses import Loss


class Work:
    """The work of one stage. Whether MTP runs, and how often, is the loss's to say; it may change along the run."""

    def __init__(self, model: MiniDeepSeek, loss: Loss) -> None:
        self.model, self.loss = model, loss
        main = [p for name, p in model.named_parameters() if not name.startswith("mtp.")]
        self.trained = sum(p.numel() for p in main if p.requires_grad)
        self._counted: dict[tuple[int, int], int] = {}

    @property
    def passes(self) -> int:
        """Of MTP layers over a sequence: those of the model, and the last one's on its own states."""
        if not (self.model.mtp and getattr(self.loss, "runs_mtp", False)):
            return 0
        return len(self.model.mtp) + getattr(self.loss, "mtp_steps", 1) - 1

    def flops(self, time: int) -> int:
        """Forward and backward of one token in sequences of `time`; a third of its products are weights' gradients."""
        key = time, self.passes
        if key not in self._counted:
            config = replace(self.model.config, num_nextn_predict_layers=self.passes)
            costs = count(config, time)
            frozen = 1 - min(self.trained / costs.total, 1)
            self._counted[key] = round(costs.flops - costs.products * frozen / 3)
        return self._counted[key]
