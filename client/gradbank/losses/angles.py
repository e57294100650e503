"""What losses share that classify by the angle between an embedding and the weights of its class."""

from dataclasses import field

import torch
from torch import Tensor

from gradbank.component import foundation
from gradbank.losses.classes import ClassificationLoss
from gradbank.losses.logits import Logits, largest
from gradbank.losses.softmax import degrees

_GATHERED_AT_ONCE = 2**22  # numbers of the embeddings' own class weights held at a time


@foundation
class AngleLoss(ClassificationLoss):
    """A softmax over classes with a margin of the angle between an embedding and its class.

    Attributes:
        avg_angle: with `collect_stats`, the mean of that angle, without the margin, in degrees.
    """

    avg_angle: float | None = field(default=None, init=False)

    def record(self, embeddings: Tensor, labels: Tensor) -> None:
        super().record(embeddings, labels)
        if self.collect_stats:
            self.avg_angle = self._average_angle(embeddings, labels)

    @torch.no_grad()
    def _average_angle(self, embeddings: Tensor, labels: Tensor) -> float:
        classes = self.classes().to(embeddings)  # (C, D), or (C, D, K)
        cosines = Logits(self.distance, merge=largest if classes.ndim == 3 else None)
        queries, total = self.distance.prepare(embeddings), 0.0
        step = max(1, _GATHERED_AT_ONCE // classes[0].numel())
        for i in range(0, len(labels), step):
            own = cosines.pairs(queries[i : i + step], classes[labels[i : i + step]])
            total += float(degrees(own).sum(dtype=torch.float64))
        return total / max(len(labels), 1)
