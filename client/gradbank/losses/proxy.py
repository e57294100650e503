"""Losses that stand a learned proxy for each class."""

from collections.abc import Mapping
from dataclasses import field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradbank.component import component, foundation
from gradbank.distances import CosineSimilarity, Distance, LpDistance
from gradbank.engine import (
    Anchors,
    LabelledPairs,
    LogSumExp,
    Part,
    References,
    Statistic,
    evaluate,
    full_precision,
    widened,
)
from gradbank.losses.classes import ClassificationLoss
from gradbank.losses.logits import Logits
from gradbank.losses.pair import softplus
from gradbank.overrides import is_ours, refuse_uncalled
from gradbank.reducers import DivisorReducer, Reducer


@foundation
class ProxyLoss(ClassificationLoss):
    """A loss with a proxy per class.

    Attributes:
        proxies: `(C, D)`, a parameter.
    """

    def make_weights(self) -> None:
        self.proxies = self.initialised(self.num_classes, self.embedding_size)

    def vectors(self) -> Tensor:
        return self.proxies

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """`(B, C)` distances or similarities to the proxies."""
        self._check_rows(embeddings)
        with full_precision(embeddings.device):
            embeddings = widened(embeddings)
            return self.distance(embeddings, self.proxies.to(embeddings))  # type: ignore[no-any-return]


@component
class ProxyNCALoss(ProxyLoss):
    """How unlikely an embedding is to choose its class when it chooses a proxy at random, nearer ones more often.

        loss[a] = -log(e(a, y_a) / sum_c e(a, c)),   e(a, c) = exp(-softmax_scale * d[a, c])

    Attributes:
        proxies: `(C, D)`, a parameter.

    Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017.
    """

    softmax_scale: float = 1.0
    distance: Distance = field(default_factory=lambda: LpDistance(power=2), kw_only=True)

    counts_anchors_only: ClassVar[bool] = True

    def logits(self) -> Distance:
        return Logits(self.distance, self.softmax_scale)


@component
class ProxyAnchorLoss(ProxyLoss):
    """Each proxy is an anchor, and the embeddings are its positives and negatives.

        pos_loss[c] = log(1 + sum_{a: y_a = c}  exp(-alpha (s[a, c] - margin)))
        neg_loss[c] = log(1 + sum_{a: y_a != c} exp( alpha (s[a, c] + margin)))

    The divisor of the first is the number of classes in the batch, that of the second C. An `indices_tuple` gives each
    embedding a weight w of at most 1, and `w - 1` is added to its exponents.

    Attributes:
        proxies: `(C, D)`, a parameter.

    Kim et al., "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020.
    """

    margin: float = 0.1
    alpha: float = 32.0
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)
    reducer: Reducer = field(default_factory=DivisorReducer, kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not is_ours(cls):
            refuse_uncalled(cls, ("negatives", "terms", "with_margin"), "its anchors are proxies; override classify")

    def get_default_weight_init_func(self) -> object:
        """What initialises the weights where nothing else is given."""
        return partial(nn.init.kaiming_normal_, mode="fan_out")

    def _sub_loss_names(self) -> list[str]:
        return ["pos_loss", "neg_loss"]

    def logits(self) -> Logits:
        return Logits(self.distance, self.alpha)

    def classify(self, embeddings: Tensor, labels: Tensor, weight: Tensor | None) -> Any:
        known = torch.arange(self.num_classes, device=labels.device)
        rows, shift = self.queries(embeddings), None
        if weight is not None:
            shift = weight - 1
            rows = torch.cat([rows, shift[:, None]], 1)
        proxies, references = self.proxies.to(embeddings), References((rows,), labels)
        return evaluate(_Anchored(self, shift), proxies, references, LabelledPairs(known, labels), self.learned())


class _Anchored:
    """`ProxyAnchorLoss` as an engine takes it: the proxies are the anchors.

    Args:
        shift: `(B,)` what is added to the exponents of each embedding, or None.
    """

    joins_anchors = False

    def __init__(self, loss: ProxyAnchorLoss, shift: Tensor | None) -> None:
        self.reducer, self.distance = loss.reducer, _FromProxies(loss.logits(), shift is not None)
        margin = loss.alpha * loss.margin
        self.margin, self.shift = margin if loss.distance.is_inverted else -margin, shift

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"near": LogSumExp(lambda z: z)}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        exponent = self.margin - anchors.s
        if self.shift is not None:  # z has it added, for the negatives
            exponent = exponent + 2 * self.shift.index_select(0, anchors.positives.other)
        far, near = anchors.logsumexp(exponent), anchors.found["near"].value + self.margin
        present = (anchors.number() > 0).sum()
        return {
            "pos_loss": anchors.per_anchor(softplus(far), divisor=present),
            "neg_loss": anchors.per_anchor(softplus(near), divisor=torch.full_like(present, anchors.size)),
        }


class _FromProxies(Distance):
    """Logits the other way around: from proxies to embeddings, which are prepared already.

    Args:
        logits: from embeddings to proxies.
        shifted: whether the last number of an embedding is none of its own, but is added to its logits.
    """

    is_inverted = True

    def __init__(self, logits: Logits, shifted: bool) -> None:
        super().__init__()
        self.of_embeddings, self.shifted = logits, shifted

    def prepare(self, embeddings: Tensor) -> Tensor:
        return embeddings

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        rows = references[:, :-1] if self.shifted else references
        z = self.of_embeddings.turned(queries, rows)
        return z + references[:, -1] if self.shifted else z

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        rows = references[:, :-1] if self.shifted else references
        z = self.of_embeddings.pairs(rows, queries)
        return z + references[:, -1] if self.shifted else z
