"""What losses share that classify by the angle between an embedding and the weights of its class."""

from dataclasses import field

import torch
from torch import Tensor

from gradbank.checks import require_positive
from gradbank.component import foundation
from gradbank.distances import CosineSimilarity, Distance
from gradbank.losses.classes import ClassificationLoss
from gradbank.losses.logits import Logits, largest
from gradbank.losses.softmax import degrees

_GATHERED_AT_ONCE = 2**22  # numbers of the embeddings' own class weights held at a time


@foundation
class AngleLoss(ClassificationLoss):
    """A softmax over classes with a margin of the angle between an embedding and its class.

    Args:
        margin: of the angle, in whichever way the subclass has it.
        scale: what a cosine is multiplied by, to make a logit.

    Attributes:
        avg_angle: with `collect_stats`, the mean of that angle, without the margin, in degrees.
    """

    margin: float
    scale: float = 64.0
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)
    avg_angle: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.require_distance(CosineSimilarity)
        require_positive(scale=self.scale)
        super().__post_init__()

    def logits(self) -> Distance:
        return Logits(self.distance, self.scale)

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
