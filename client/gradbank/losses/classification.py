"""Losses that classify embeddings with a learned weight per class."""

import math
from dataclasses import field

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbank.checks import require_positive
from gradbank.component import component
from gradbank.distances import Distance, DotProductSimilarity
from gradbank.engine import Anchors
from gradbank.losses.angles import AngleLoss
from gradbank.losses.classes import ClassificationLoss
from gradbank.losses.logits import Logits
from gradbank.losses.softmax import angle, radians


@component
class NormalizedSoftmaxLoss(ClassificationLoss):
    """Softmax over classes, on the directions of their weights.

        z[a, c] = s[a, c] / temperature,   s[a, c] = x_a . w_c / (|x_a| |w_c|)

    without a margin. With a distance in place of a similarity the logit changes sign. Weights are normalised whatever
    the distance.

    Attributes:
        W: the `(D, C)` class weights.

    Raises:
        ValueError: a temperature that is not above 0.

    Wang et al., "NormFace: L2 Hypersphere Embedding for Face Verification", ACM MM 2017;
    Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019.
    """

    temperature: float = 0.05
    distance: Distance = field(default_factory=DotProductSimilarity, kw_only=True)

    def __post_init__(self) -> None:
        require_positive(temperature=self.temperature)
        super().__post_init__()

    def logits(self) -> Distance:
        return Logits(self.distance, 1 / self.temperature, unit=True)

    def record(self, embeddings: Tensor, labels: Tensor) -> None:
        if self.distance.collect_stats:
            self.distance.record(embeddings, (F.normalize(self.vectors(), p=self.distance.p, dim=1),))


@component
class CosFaceLoss(AngleLoss):
    """Softmax over classes, with a margin taken off the cosine to the embedding's own class.

        z[a, c] = scale * cos(t_c),   z'[a, y] = scale * (cos(t_y) - margin)

    where `t_c` is the angle between embedding and class weight.

    Args:
        margin: of the cosine.
        scale: the inverse temperature.

    Attributes:
        W: the `(D, C)` class weights.

    Raises:
        ValueError: a scale that is not above 0, or a distance other than `CosineSimilarity`.

    Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018.
    """

    margin: float = 0.35

    def with_margin(self, z: Tensor, anchors: Anchors) -> Tensor:
        return z - self.margin * self.scale


@component
class ArcFaceLoss(AngleLoss):
    """Softmax over classes, with a margin added to the angle to the embedding's own class.

        z[a, c] = scale * cos(t_c),   z'[a, y] = scale * cos(t_y + margin)

    where `t_c` is the angle between embedding and class weight. Beyond `pi - margin` the cosine would turn back:
    there `cos(t_y) - margin * sin(margin)` takes its place.

    Args:
        margin: in degrees.
        scale: the inverse temperature.

    Attributes:
        W: the `(D, C)` class weights.

    Raises:
        ValueError: a scale that is not above 0, or a distance other than `CosineSimilarity`.

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019.
    """

    margin: float = 28.6

    def with_margin(self, z: Tensor, anchors: Anchors) -> Tensor:
        margin, cosine = radians(self.margin), z / self.scale
        t = angle(cosine)
        beyond = cosine - margin * margin.sin()
        return self.scale * torch.where(t <= math.pi - margin, (t + margin).cos(), beyond)
