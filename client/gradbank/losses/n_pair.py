"""The N-pair loss over one pair of each class, chosen at random."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbank.checks import check_batch
from gradbank.component import component
from gradbank.distances import DotProductSimilarity
from gradbank.engine import full_precision, widened
from gradbank.losses.loss import Loss
from gradbank.losses.softmax import NTXentLoss


@component
class NPairLoss(Loss):
    """Compares an anchor of each class with its positive and the positives of all other classes.

        loss = mean_i log(1 + sum_{j != i} exp(a_i . (p_j - p_i) / tao)) + l2_reg * mean_i (|a_i|^2 + |p_i|^2)

    over one random pair `(a_i, p_i)` of each label that at least two rows have. Rows are brought to length 1 first, so
    that the last term is the constant `2 * l2_reg`. Without any pair the loss is 0 and backpropagates zeros.
    `NPairsLoss` takes the first pair of each label, and lengths as they are.

    Args:
        l2_reg: the weight of the last term.
        tao: the temperature.

    Raises:
        ValueError: a temperature that is not positive; when it is called, a shape that does not fit, neither labels
            nor pairs, or an indices_tuple.

    Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016.
    """

    l2_reg: float = 0.02
    tao: float = 1.0

    def __post_init__(self) -> None:
        if self.tao <= 0:
            raise ValueError(f"tao is a temperature and must be positive, got {self.tao}")

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: None = None,
        *,
        target: Tensor | None = None,
        pairs: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            embeddings: `(B, D)` floats.
            labels: `(B,)`; `target` is another name for them.
            pairs: `(n, 2)` int64, the row of each anchor and of its positive, in place of random ones.
            generator: what draws the pairs; None is torch's global one.
        """
        if indices_tuple is not None:
            raise ValueError("NPairLoss takes one pair of each class: pass pairs, (n, 2), not an indices_tuple")
        labels = target if labels is None else labels
        check_batch(embeddings, labels)
        if pairs is None:
            if labels is None:
                raise ValueError("NPairLoss needs labels, or pairs")
            pairs = random_pairs(labels, generator)
        elif pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(f"pairs must be (n, 2), anchors and positives, got shape {tuple(pairs.shape)}")
        elif len(pairs) and not 0 <= int(pairs.min()) <= int(pairs.max()) < len(embeddings):
            raise ValueError(
                f"pairs name rows {int(pairs.min())} to {int(pairs.max())}, but must stay within "
                f"0..{len(embeddings) - 1}"
            )
        embeddings = widened(embeddings)
        with full_precision(embeddings.device):
            loss: Tensor = self.regularized(self._of_pairs(embeddings, pairs.to(embeddings.device)), embeddings)
        return loss

    def _of_pairs(self, embeddings: Tensor, pairs: Tensor) -> Tensor:
        if not len(pairs):
            return (embeddings * 0).sum()
        unit = F.normalize(embeddings.index_select(0, pairs.T.flatten()), dim=1)  # of those that are compared
        anchors, positives = unit.chunk(2)
        # a softmax over the positives, of which the anchor's is its own
        softmax = NTXentLoss(self.tao, distance=DotProductSimilarity(normalize_embeddings=False))
        number = torch.arange(len(pairs), device=embeddings.device)
        cost: Tensor = softmax(anchors, number, ref_emb=positives, ref_labels=number.clone())
        return cost + self.l2_reg * self.l2_loss(anchors, positives)

    @staticmethod
    def get_n_pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
        """Random pairs of rows, `(n, 2)`, and the rows of the other pairs' positives, `(n, n - 1)`."""
        pairs = random_pairs(labels)
        others = ~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)
        return pairs, pairs[:, 1].expand(len(pairs), -1)[others].view(len(pairs), max(len(pairs) - 1, 0))

    @staticmethod
    def n_pair_loss(anchors: Tensor, positives: Tensor, negatives: Tensor, tao: float = 1.0) -> Tensor:
        """The first term of the loss, of `(n, D)` anchors and positives and `(n, n - 1, D)` negatives."""
        farther = (negatives - positives.unsqueeze(1)) @ anchors.unsqueeze(2) / tao
        return farther.squeeze(2).exp().sum(1).log1p().mean()

    @staticmethod
    def l2_loss(anchors: Tensor, positives: Tensor) -> Tensor:
        """The mean of `|a_i|^2 + |p_i|^2`, of `(n, D)` anchors and positives."""
        return (anchors.square() + positives.square()).sum() / len(anchors)


def random_pairs(labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """`(n, 2)`: two different rows of each label that at least two of the `(B,)` have, by label."""
    shuffled = torch.randperm(len(labels), generator=generator, device=None if generator is None else generator.device)
    shuffled = shuffled.to(labels.device)
    rows = shuffled[labels[shuffled].argsort(stable=True)]
    ordered = labels[rows]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    place = (first[:-1] & ~first[1:]).nonzero().squeeze(1)  # a label's first row, if another follows
    return torch.stack([rows[place], rows[place + 1]], 1)
