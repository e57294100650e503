"""Two views of each sample, compared without labels."""

import torch
from torch import Tensor, nn

from gradbank.checks import check_batch
from gradbank.component import component, components
from gradbank.engine import full_precision, widened
from gradbank.losses.loss import Staged
from gradbank.losses.pair import PairLoss
from gradbank.wrappers.base import BaseLossWrapper


@component
class SelfSupervisedLoss(BaseLossWrapper):
    """Calls `loss` with labels that say that row i of one view and row i of the other are the same sample.

    Args:
        loss: a loss of pairs or triplets; one of your own may be any `PairLoss` without parameters of its own.
        symmetric: whether both views are anchors, each compared with every other row of both; if not, the rows of
            `embeddings` are compared with those of `ref_emb`.

    Raises:
        ValueError: a loss that is not supported; when it is called, views of different shapes.

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020.
    """

    symmetric: bool = True

    def __post_init__(self) -> None:
        if not _compares(type(self.loss)):
            super().__post_init__()

    @staticmethod
    def supported_losses() -> list[str]:
        return [name for name, each in components().items() if _compares(each)]

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """The loss of two `(B, D)` views of the same samples, a scalar."""
        return self.carried_out(embeddings, ref_emb)

    def stage(self, embeddings: Tensor, ref_emb: Tensor | None = None, labels: Tensor | None = None) -> Staged:
        distance = getattr(self.loss, "distance", None)
        check_batch(embeddings, None, any_shape=distance is not None and distance.takes_any_shape)
        if ref_emb is None or labels is not None:
            raise ValueError(
                f"{type(self).__name__} takes two views, embeddings and ref_emb, and makes the labels itself"
            )
        if ref_emb.shape != embeddings.shape:
            raise ValueError(
                f"ref_emb must be {tuple(embeddings.shape)}, another view of each row of embeddings, got "
                f"{tuple(ref_emb.shape)}"
            )
        sample = torch.arange(len(embeddings), device=embeddings.device)
        rows = widened(embeddings)
        others = rows if ref_emb is embeddings else widened(ref_emb)
        if self.symmetric:
            with full_precision(rows.device):
                views = torch.cat([rows, others])
            return self._around(self.loss.stage(views, torch.cat([sample, sample])), views)
        # of the very same labels, reference i would be anchor i itself, and not its positive
        staged = self.loss.stage(rows, sample, ref_emb=others, ref_labels=sample.clone())
        return self._around(staged, rows)

    def _around(self, staged: Staged, embeddings: Tensor) -> Staged:
        return staged._replace(loss=self.regularized(staged.loss, embeddings))


@component
class SelfSupervisedLossWrapper(SelfSupervisedLoss):
    """`SelfSupervisedLoss` under its older name, called as `loss_fn(embeddings, labels)`.

    The labels say which rows are views of the same sample. In their place there may be `(B, D)` embeddings of another
    view, and the call is that of `SelfSupervisedLoss`.
    """

    def forward(  # type: ignore[override]
        self, embeddings: Tensor, labels: Tensor | None = None, ref_emb: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar.

        Raises:
            ValueError: neither labels nor another view, or both.
        """
        return self.carried_out(embeddings, labels, ref_emb)

    def stage(  # type: ignore[override]
        self, embeddings: Tensor, labels: Tensor | None = None, ref_emb: Tensor | None = None
    ) -> Staged:
        if (labels is None) == (ref_emb is None):
            raise ValueError("SelfSupervisedLossWrapper takes either labels or ref_emb, another view of each row")
        view = labels if ref_emb is None else ref_emb
        assert view is not None
        if view.ndim > 1:
            return super().stage(embeddings, view)
        rows = widened(embeddings)
        return self._around(self.loss.stage(rows, view), rows)


def _compares(loss: type[nn.Module]) -> bool:
    """Whether a loss compares embeddings with whatever references it is given."""
    return issubclass(loss, PairLoss) and loss.takes_references and not loss.learns_references
