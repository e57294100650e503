"""Losses that classify embeddings by angles with a multiplied margin, and by lengths."""

import math

import torch
from torch import Tensor, nn

from gradbank.component import component
from gradbank.distances import CosineSimilarity, Distance, DotProductSimilarity
from gradbank.engine import Anchors
from gradbank.losses.angles import AngleLoss
from gradbank.losses.logits import Logits

_MOST = 100  # times an angle: its cosine is made by as many multiplications, each of which takes a rounding


@component
class SphereFaceLoss(AngleLoss):
    """Softmax over classes, with the angle to the embedding's own class multiplied; longer embeddings count more.

        z[a, c] = scale * |x_a| cos(t_c),   z'[a, y] = scale * |x_a| psi(t_y)
        psi(t) = (-1)^k cos(margin * t) - 2k   for t between k pi / margin and (k + 1) pi / margin

    where `t_c` is the angle between embedding and class weight; psi falls all the way from 1 to `1 - 2 margin`.

    Args:
        margin: a whole number up to 100; a fraction is cut off.
        scale: the inverse temperature.

    Attributes:
        W: the `(D, C)` class weights.

    Raises:
        ValueError: a margin that is not from 1 to 100, a scale that is not above 0, or a distance other than
            `CosineSimilarity()`.

    Liu et al., "SphereFace: Deep Hypersphere Embedding for Face Recognition", CVPR 2017.
    """

    margin: float = 4
    scale: float = 1.0

    def __post_init__(self) -> None:
        self.require_distance(CosineSimilarity, p=2, power=1)
        if not 1 <= self.margin <= _MOST:
            raise ValueError(f"margin must be from 1 to {_MOST}, got {self.margin}")
        super().__post_init__()

    def queries(self, embeddings: Tensor) -> Tensor:
        return embeddings  # as long as they are

    def with_margin(self, z: Tensor, anchors: Anchors) -> Tensor:
        return self.multiplied(z, anchors.each(anchors.embeddings.norm(dim=1)))

    def multiplied(self, z: Tensor, length: Tensor) -> Tensor:
        """The logits with a margin, given the product of the lengths that are in z."""
        length = self.scale * length
        return length * multiplied_angle(z / length.clamp(min=1e-12), int(self.margin))


@component
class LargeMarginSoftmaxLoss(SphereFaceLoss):
    """`SphereFaceLoss` with class weights whose lengths count too.

        z[a, c] = scale * |x_a| |w_c| cos(t_c),   z'[a, y] = scale * |x_a| |w_y| psi(t_y)

    Attributes:
        W: the `(D, C)` class weights.

    Raises:
        ValueError: a margin that is not from 1 to 100, a scale that is not above 0, or a distance other than
            `CosineSimilarity()`.

    Liu et al., "Large-Margin Softmax Loss for Convolutional Neural Networks", ICML 2016.
    """

    def logits(self) -> Distance:
        return Logits(DotProductSimilarity(normalize_embeddings=False), self.scale)

    def learned(self) -> list[nn.Parameter]:
        return [each for each in self.parameters() if each.requires_grad]  # W as well, for the lengths below

    def with_margin(self, z: Tensor, anchors: Anchors) -> Tensor:
        own = self.W.T.to(anchors.embeddings.device)[anchors.labels].to(anchors.embeddings)
        return self.multiplied(z, anchors.each(anchors.embeddings.norm(dim=1) * own.norm(dim=1)))


def multiplied_angle(cosine: Tensor, margin: int) -> Tensor:
    """`(-1)^k cos(margin * t) - 2k` for the angle t of a cosine, in the k-th of `margin` equal parts of `0 .. pi`."""
    last, now = torch.ones_like(cosine), cosine  # the cosines of 0 t and of 1 t
    for _ in range(margin - 1):
        last, now = now, 2 * cosine * now - last
    k = (cosine.detach().clamp(-1, 1).acos() / (math.pi / margin)).floor()
    return (1 - 2 * (k % 2)) * now - 2 * k
