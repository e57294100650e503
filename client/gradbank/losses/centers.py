"""Losses that give each class several centers."""

import math
from dataclasses import field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradbank.checks import require_positive
from gradbank.component import component
from gradbank.distances import CosineSimilarity, Distance
from gradbank.engine import Anchors, full_precision, widened
from gradbank.losses.classes import ClassificationLoss
from gradbank.losses.classification import ArcFaceLoss
from gradbank.losses.logits import Logits, largest
from gradbank.losses.products import by_class

_GATHERED_AT_ONCE = 2**22  # numbers of the embeddings' own centers held at a time


@component
class SubCenterArcFaceLoss(ArcFaceLoss):
    """`ArcFaceLoss` with several centers per class, the closest of which counts.

        cos(t_c) = max_k cos(t_ck)

    where `t_ck` is the angle between an embedding and the class's k-th center. What is far from the center that most
    of its class are closest to may be mislabelled: see `get_outliers`.

    Args:
        margin: in degrees.
        scale: the inverse temperature.
        sub_centers: K.

    Attributes:
        W: the `(D, C * K)` centers; columns `c * K` to `c * K + K - 1` are those of class c.

    Raises:
        ValueError: a distance other than `CosineSimilarity`.

    Deng et al., "Sub-center ArcFace: Boosting Face Recognition by Large-Scale Noisy Web Faces", ECCV 2020.
    """

    sub_centers: int = 3

    def make_weights(self) -> None:
        require_positive(sub_centers=self.sub_centers)
        self.W = self.initialised(self.embedding_size, self.num_classes * self.sub_centers)

    def classes(self) -> Tensor:
        return by_class(self.W, self.sub_centers)

    def logits(self) -> Distance:
        return Logits(self.distance, self.scale, merge=largest)

    @torch.no_grad()
    def get_outliers(
        self, embeddings: Tensor, labels: Tensor, threshold: float = 75, return_dominant_centers: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Which embeddings are far from the dominant center of their class.

        A class's dominant center is that to which most of its embeddings are closest; the first among equals.

        Args:
            embeddings: `(N, D)` floats.
            labels: `(N,)` classes in `0 .. C - 1`.
            threshold: the angle, in degrees, beyond which an embedding is an outlier.
            return_dominant_centers: whether they are returned too.

        Returns:
            The places of the outliers in `embeddings`, class by class: int64. With `return_dominant_centers` also the
            `(D, C)` dominant centers, 0 for a class without embeddings.

        Raises:
            ValueError: a shape or a class that does not fit.
        """
        labels = self._checked(embeddings, labels, None, None)
        embeddings = widened(embeddings)
        centers = self.classes().to(embeddings)  # (C, D, K)
        with full_precision(embeddings.device):
            queries, cosines = self.distance.prepare(embeddings), Logits(self.distance)
            step = max(1, _GATHERED_AT_ONCE // centers[0].numel())
            chunks = [
                cosines.to_each(queries[i : i + step], centers[labels[i : i + step]])
                for i in range(0, max(len(labels), 1), step)
            ]
        cosine = torch.cat(chunks)  # (N, K)
        classes, number = self.num_classes, self.sub_centers
        votes = torch.bincount(labels * number + cosine.argmax(1), minlength=classes * number)
        dominant = votes.view(classes, number).argmax(1)
        far = cosine.gather(1, dominant[labels, None]).squeeze(1) < math.cos(math.radians(threshold))
        order = labels.argsort(stable=True)
        outliers = order[far[order]]
        if not return_dominant_centers:
            return outliers
        columns = torch.arange(classes, device=dominant.device) * number + dominant
        some = torch.bincount(labels, minlength=classes) > 0
        return outliers, torch.where(some, self.W.to(embeddings)[:, columns], 0)


@component
class SoftTripleLoss(ClassificationLoss):
    """Softmax over classes, each of several centers that are weighted by how close they are.

        z[a, c] = la * s[a, c],   z'[a, y] = la * (s[a, y] - margin)
        s[a, c] = sum_k q_k s[a, ck],   q = softmax over k of s[a, ck] / gamma

    Args:
        centers_per_class: K.
        la: the inverse temperature, over classes.
        gamma: the temperature over a class's centers.
        margin: of the similarity.

    Attributes:
        fc: the `(D, C * K)` centers; columns `c * K` to `c * K + K - 1` are those of class c.

    Raises:
        ValueError: la or gamma that is not above 0, or a distance of which larger is not closer.

    Qian et al., "SoftTriple Loss: Deep Metric Learning Without Triplet Sampling", ICCV 2019.
    """

    centers_per_class: int = 10
    la: float = 20.0
    gamma: float = 0.1
    margin: float = 0.01
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)

    def __post_init__(self) -> None:
        if not self.distance.is_inverted:
            raise ValueError(
                f"SoftTripleLoss wants a similarity, such as CosineSimilarity, as its distance; got {self.distance}"
            )
        require_positive(la=self.la, gamma=self.gamma)
        super().__post_init__()

    def make_weights(self) -> None:
        require_positive(centers_per_class=self.centers_per_class)
        self.fc = self.initialised(self.embedding_size, self.num_classes * self.centers_per_class)

    def get_default_weight_init_func(self) -> object:
        """What initialises the weights where nothing else is given."""
        return partial(nn.init.kaiming_uniform_, a=math.sqrt(5))

    def vectors(self) -> Tensor:
        return self.fc.T

    def classes(self) -> Tensor:
        return by_class(self.fc, self.centers_per_class)

    def logits(self) -> Distance:
        return Logits(self.distance, 1 / self.gamma, merge=self._weighted)

    def _weighted(self, z: Tensor) -> Tensor:
        mean: Tensor = _SoftmaxMean.apply(z)  # type: ignore[no-untyped-call]
        return mean * (self.gamma * self.la)

    def with_margin(self, z: Tensor, anchors: Anchors) -> Tensor:
        return z - self.margin * self.la

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """`(B, C)` similarities to the classes: their argmax is the predicted class."""
        return super().get_logits(embeddings) / self.la


class _SoftmaxMean(torch.autograd.Function):
    """The mean of each `(..., K)`, weighted by its softmax; computed with K first, for sums over a short last dimension
    are slow."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        z = z.movedim(-1, 0).contiguous()
        share = z.softmax(0)
        mean = (share * z).sum(0)
        ctx.save_for_backward(z, share, mean)
        return mean

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        z, share, mean = ctx.saved_tensors
        made: Tensor = (z - mean).add_(1).mul_(share).mul_(gradient)
        return made.movedim(0, -1)
