"""The miner of triplets whose negative lies at a wide angle."""

import math
from dataclasses import field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbank.component import component
from gradbank.engine import Indices, room, widened
from gradbank.miners.base import Miner, check_unit_euclidean
from gradbank.miners.listing import PairList, TripletList
from gradbank.miners.rows import ENTRIES, blocks, kinds

EPSILON = 1e-6  # what F.pairwise_distance adds to each difference, and PML with it


@component
class AngularMiner(Miner):
    """Takes the triplets that form an angle wider than `angle` degrees.

        angle[a, p, n] = arctan(|a - p| / (2 |n - (a + p) / 2|))

    Embeddings are taken as they are, not normalised, as in PML. Products of centres and negatives tell most angles;
    where they could round to the wrong side of `angle`, the vectors themselves are compared.

    Attributes:
        average_angle, min_angle, max_angle, std_of_angle: with `collect_stats`, of all triplets, in degrees.
        average_angle_above_threshold, average_angle_below_threshold: of the triplets taken, and of the others.

    Raises:
        ValueError: a distance other than the default.

    Wang et al., "Deep Metric Learning with Angular Loss", ICCV 2017.
    """

    angle: float = 20
    average_angle: float | None = field(default=None, init=False)
    average_angle_above_threshold: float | None = field(default=None, init=False)
    average_angle_below_threshold: float | None = field(default=None, init=False)
    min_angle: float | None = field(default=None, init=False)
    max_angle: float | None = field(default=None, init=False)
    std_of_angle: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit_euclidean(self)

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Indices:
        anchors, others = widened(embeddings.detach()), widened(ref_emb.detach())
        near = PairList(len(others), anchors.device)
        for rows in blocks(len(anchors), len(others), anchors.device):
            near.add(kinds(labels, ref_labels, rows)[0].view(-1).nonzero().squeeze(1), rows.start)
        pairs, squares = near.pairs(), (others + EPSILON).square().sum(1)

        def angles_of(a: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            angles, wide = self._angles(anchors[a], others[p], others, squares)
            return angles, wide, labels[a, None] != ref_labels

        def negatives_of(a: Tensor, p: Tensor) -> Tensor:
            _, wide, negatives = angles_of(a, p)
            return wide.logical_and_(negatives).nonzero()[:, 1]

        found, seen = TripletList(anchors.device), []
        counts = torch.empty_like(pairs[0])  # one piece: small ones would scatter what is free in between
        # pairs at a time, each with several numbers per entry
        chunk = max(1, room(ENTRIES // 4, anchors.device) // max(len(others), 1))
        for start in range(0, len(counts), chunk):
            a, p, counted = (each[start : start + chunk] for each in (*pairs, counts))
            angles, wide, negatives = angles_of(a, p)
            torch.sum(wide & negatives, 1, out=counted)
            found.add(a, p, counted, partial(negatives_of, a, p))
            if self.collect_stats:
                seen.append(_summary(angles[negatives], wide[negatives]))
        if seen:
            self._set_stats(torch.stack(seen))
        return found.triplets()

    def _angles(self, anchors: Tensor, positives: Tensor, others: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """`(P, M)`: the angle of each pair with each of the others, and whether it is wide enough."""
        width = F.pairwise_distance(anchors, positives, eps=EPSILON)
        centres = (anchors + positives) / 2
        # |n - c + eps|^2
        own = centres.square().sum(1, keepdim=True)
        square = torch.addmm(own + squares, centres, (others + EPSILON).mT, alpha=-2).clamp_(min=0)
        angles = torch.atan(width[:, None] / (2 * square.sqrt()))
        limit = math.radians(self.angle)
        wide = angles > limit
        # an error e of the square moves the angle by e / (4 square) at most
        slack = others.shape[1] * torch.finfo(own.dtype).eps * (own + squares.max())
        pair, n = ((angles - limit).abs() * square <= slack).nonzero(as_tuple=True)
        exact = F.pairwise_distance(others[n], centres[pair], eps=EPSILON)
        angles[pair, n] = torch.atan(width[pair] / (2 * exact))
        wide[pair, n] = angles[pair, n] > limit
        return angles, wide

    def _set_stats(self, seen: Tensor) -> None:
        number, total, square, number_wide, total_wide = seen[:, :5].sum(0).tolist()
        if number:
            mean = total / number
            deviation = math.sqrt(max(square - number * mean**2, 0) / max(number - 1, 1))
            self.average_angle, self.std_of_angle = math.degrees(mean), math.degrees(deviation)
            self.min_angle = math.degrees(float(seen[:, 5].min()))
            self.max_angle = math.degrees(float(seen[:, 6].max()))
        if number_wide:
            self.average_angle_above_threshold = math.degrees(total_wide / number_wide)
        if number > number_wide:
            self.average_angle_below_threshold = math.degrees((total - total_wide) / (number - number_wide))


def _summary(angles: Tensor, wide: Tensor) -> Tensor:
    """Of some triplets' angles: number, sum, sum of squares, number and sum of the wide ones, lowest and highest."""
    angles = angles.double()
    ends = (angles.min(), angles.max()) if len(angles) else angles.new_tensor([torch.inf, -torch.inf]).unbind()
    number, number_wide = (angles.new_tensor(float(x)) for x in (len(angles), wide.sum()))
    return torch.stack([number, angles.sum(), angles.square().sum(), number_wide, angles[wide].sum(), *ends])
