"""A loss of similarities along the manifold that the batch spans."""

import math
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradbank.checks import check_counts
from gradbank.component import component
from gradbank.distances import CosineSimilarity, Distance
from gradbank.losses.base import BaseMetricLossFunction
from gradbank.mismatch import Mismatch
from gradbank.reducers.kept import LossDict, part_of_all


@component
class ManifoldLoss(BaseMetricLossFunction):
    """Compares embeddings with proxies by a random walk over both, instead of directly.

        A = exp(2 relu(s)) off the diagonal, 0 on it      s: similarities among the N embeddings and K proxies
        R = (1 - alpha) (I - alpha D^-1/2 A D^-1/2)^-1    D: the row sums of A
        intrinsic[i] = log(1 + sum_k exp(R[i, k] - R[i, y_i] + margin))
        context[i]   = log(1 + sum_k exp(cos(R[i], R[k]) - cos(R[i], R[y_i]) + margin))
        loss = mean_i intrinsic[i] + lambdaC * mean_i context[i]

    with k over those proxies other than the embedding's own, `y_i`, of which the exponent is 0 or more: the others are
    left out. It is called `loss_fn(embeddings)`, and then draws the `y_i` from torch's global generator, every proxy at
    least once; or `loss_fn(embeddings, indices_tuple=y)`. A step takes `O((N + K)^2)` memory.

    Args:
        l: D.
        K: how many proxies there are.
        lambdaC: the weight of the context loss; 0 leaves it out, and infinity leaves the intrinsic loss out (PML's
            loss is infinite then).
        alpha: how much similarity is passed on to neighbours, between 0 and 1.

    Attributes:
        proxies: `(K, D)`, a parameter.

    Raises:
        ValueError: a negative lambdaC, an alpha outside 0 and 1, no proxies; when it is called, labels or references,
            another dimension, an indices_tuple that is not `(N,)` integers in `0 .. K - 1`, or none and N < K.

    Aziere & Todorovic, "Ensemble Deep Manifold Similarity Learning Using Hard Proxies", CVPR 2019.
    """

    l: int  # noqa: E741  (the name in PML, as the others)
    K: int = 50
    lambdaC: float = 1.0
    alpha: float = 0.8
    margin: float = 5e-4
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)

    takes_references: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.lambdaC < 0:
            raise ValueError(f"lambdaC must not be negative, got {self.lambdaC}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha}")
        check_counts(self, "l", "K")
        self.proxies = nn.Parameter(torch.randn(self.K, self.l))

    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> LossDict:
        if labels is not None or ref_labels is not None:
            raise ValueError("ManifoldLoss takes no labels: pass the proxy of each embedding as indices_tuple")
        if ref_emb is not None and ref_emb is not embeddings:
            raise ValueError("ManifoldLoss compares with its proxies: it takes no ref_emb")
        if embeddings.shape[1] != self.l:
            raise Mismatch(
                f"embeddings have dimension {embeddings.shape[1]}, but ManifoldLoss was built with l={self.l}"
            )
        if not len(embeddings):
            return self.zero_losses()
        own = self._own(indices_tuple, len(embeddings)).to(embeddings.device).unsqueeze(1)
        walk, batch = self._steps(embeddings), len(embeddings)
        loss = embeddings.new_zeros(())
        if self.lambdaC == 0:  # what passes between embeddings is not needed
            of_proxies = torch.eye(len(walk), dtype=walk.dtype, device=walk.device)[:, batch:]
            between = torch.linalg.solve(walk, of_proxies)[:batch]
        else:
            passed = torch.linalg.inv(walk)
            between = passed[:batch, batch:]
            of_embeddings, of_proxies = F.normalize(passed[:batch], dim=1), F.normalize(passed[batch:], dim=1)
            context = self._exceeding(of_embeddings @ of_proxies.T, own)
            loss = context if self.lambdaC == math.inf else self.lambdaC * context
        if self.lambdaC != math.inf:
            loss = loss + self._exceeding((1 - self.alpha) * between, own)
        return {"loss": part_of_all(loss)}

    def _own(self, chosen: Any, batch: int) -> Tensor:
        """`(N,)`: the proxy of each embedding."""
        if chosen is None:
            if batch < self.K:
                raise ValueError(
                    f"ManifoldLoss draws each of its K={self.K} proxies at least once, and got {batch} embeddings: "
                    "pass more, build it with fewer proxies, or choose the proxies by indices_tuple"
                )
            # the draws of PML, so that one seed gives one loss
            others = torch.randint(0, self.K, (batch - self.K,))
            return torch.cat((torch.arange(self.K), others))[torch.randperm(batch)]
        if isinstance(chosen, tuple | list) and len(chosen) == 1:
            chosen = chosen[0]
        own = torch.as_tensor(chosen)
        if own.shape != (batch,) or own.is_floating_point():
            raise ValueError(
                f"indices_tuple must be ({batch},) integers, the proxy of each embedding, got {tuple(own.shape)} "
                f"{own.dtype}"
            )
        if not 0 <= int(own.min()) <= int(own.max()) < self.K:
            raise ValueError(
                f"indices_tuple must be in 0..{self.K - 1} (K={self.K}), got {int(own.min())}..{int(own.max())}"
            )
        return own.long()

    def _steps(self, embeddings: Tensor) -> Tensor:
        """`I - alpha D^-1/2 A D^-1/2`."""
        nodes = torch.cat([embeddings, self.proxies.to(embeddings)])
        affinity = (self.distance(nodes, nodes).clamp(min=0) * 2).exp()
        same = torch.eye(len(nodes), dtype=torch.bool, device=nodes.device)
        affinity = affinity.masked_fill(same, 0)
        share = affinity.sum(1).rsqrt()
        passed: Tensor = self.alpha * share.unsqueeze(1) * affinity * share
        return same.to(affinity) - passed

    def _exceeding(self, to_proxies: Tensor, own: Tensor) -> Tensor:
        """The mean, over embeddings, of what proxies other than their own cost: `(N, K)` and `(N, 1)`."""
        excess = to_proxies - to_proxies.gather(1, own) + self.margin
        counts = (~(excess < 0)).scatter(1, own, False)  # and NaN, which is to be seen
        return torch.where(counts, excess, -math.inf).exp().sum(1).log1p().mean()
