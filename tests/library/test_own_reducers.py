"""Reducers of a user's own, written for pytorch-metric-learning: one text, run with either library."""

from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.reducers as pml_reducers
import pytorch_metric_learning.regularizers as pml_regularizers
import torch
from torch import Tensor

from gradbank import losses, reducers, regularizers


def written(library: Any) -> dict[str, Any]:
    """Reducers, written against the names of `library`."""

    class Unpack(library.BaseReducer):  # type: ignore[misc]
        """Keeps a loss for each anchor, as programs do that weigh them."""

        def element_reduction(self, losses: Tensor, indices: Tensor, embeddings: Tensor, labels: Any) -> Tensor:
            return losses[torch.argsort(indices)]

    class Costly(library.AvgNonZeroReducer):  # type: ignore[misc]
        """Adds a cost of the embeddings in its `forward`, which is called for each part."""

        def forward(self, loss_dict: Any, embeddings: Tensor, labels: Any) -> Tensor:
            assert len(loss_dict) == 1
            made: Tensor = super().forward(loss_dict, embeddings, labels)
            return made + 0.5 * embeddings.pow(2).mean()

    class Running(library.MeanReducer):  # type: ignore[misc]
        """Remembers the part that it reduces, each by itself."""

        def forward(self, loss_dict: Any, embeddings: Tensor, labels: Any) -> Tensor:
            made: Tensor = super().forward(loss_dict, embeddings, labels)
            self.running = 0.5 * getattr(self, "running", made.detach()) + 0.5 * made.detach()
            return made / self.running.clamp(min=1e-6)

    class Summed(library.AvgNonZeroReducer):  # type: ignore[misc]
        """Sums the losses of anchors; of pairs and triplets, it does what its base does."""

        def element_reduction(self, losses: Tensor, *rest: Any) -> Tensor:
            return losses.sum()

    class Averaged(library.MultipleReducers):  # type: ignore[misc]
        """The mean of the parts, in place of their sum."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__({"pos_loss": library.MeanReducer()}, **kwargs)

        def sub_loss_reduction(self, sub_losses: Tensor, embeddings: Any = None, labels: Any = None) -> Tensor:
            return sub_losses.mean()

    return {each.__name__: each for each in (Unpack, Costly, Running, Summed, Averaged)}


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(24, 8), torch.arange(24) % 6


CASES = [
    ("Unpack", "SupConLoss"),
    ("Costly", "ContrastiveLoss"),
    ("Costly", "NTXentLoss"),
    ("Running", "ContrastiveLoss"),
    ("Running", "MarginLoss"),
    ("Summed", "TripletMarginLoss"),
    ("Summed", "ContrastiveLoss"),
    ("Summed", "SupConLoss"),
    ("Averaged", "ContrastiveLoss"),
]


@pytest.mark.parametrize(("reducer", "loss"), CASES)
def test_a_reducer_of_ones_own_does_what_it_does_in_pml(reducer: str, loss: str) -> None:
    embeddings, labels = batch()
    ours, theirs = (embeddings.clone().requires_grad_() for _ in range(2))
    here = getattr(losses, loss)(reducer=written(reducers)[reducer]())
    there = getattr(pml_losses, loss)(reducer=written(pml_reducers)[reducer]())
    for scale in (1.0, 1.1):  # twice, for it may remember something
        found, wanted = here(ours * scale, labels), there(theirs * scale, labels)
        torch.testing.assert_close(found, wanted)
        gradients = [torch.autograd.grad(each.square().sum(), of)[0] for each, of in ((found, ours), (wanted, theirs))]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("regularized", [False, True])
def test_a_forward_of_ones_own_that_is_written_as_pmls_is_works(regularized: bool) -> None:
    def mine(losses: Any, regularizers: Any) -> Any:
        class Own(losses.BaseMetricLossFunction):  # type: ignore[misc]
            def compute_loss(self, embeddings: Tensor, labels: Any, indices: Any, ref_emb: Any, ref_labels: Any) -> Any:
                cost = embeddings.square().sum(1)
                return {"loss": {"losses": cost, "indices": torch.arange(len(cost)), "reduction_type": "element"}}

            def forward(self, embeddings: Tensor, labels: Any, times: float) -> Any:
                loss_dict = self.compute_loss(embeddings, labels, None, embeddings, labels)
                self.add_embedding_regularization_to_loss_dict(loss_dict, embeddings)
                return self.reducer(loss_dict, embeddings, labels) * times

        regularizer = regularizers.LpRegularizer() if regularized else None
        return Own(embedding_regularizer=regularizer, embedding_reg_weight=0.3)

    embeddings, labels = batch()
    found = mine(losses, regularizers)(embeddings, labels, 2.0)
    torch.testing.assert_close(found, mine(pml_losses, pml_regularizers)(embeddings, labels, 2.0))


def test_a_declared_loss_says_that_it_has_no_compute_loss() -> None:
    embeddings, labels = batch()
    with pytest.raises(NotImplementedError, match=r"NTXentLoss is computed by an engine .*DoNothingReducer"):
        losses.NTXentLoss().compute_loss(embeddings, labels, None, embeddings, labels)


def test_several_losses_may_be_given_what_ones_own_method_chooses() -> None:
    embeddings, labels = batch()
    one = tuple(torch.tensor([i, j]) for i, j in ((0, 1), (6, 7), (0, 1), (1, 2)))

    def mine(library: Any) -> Any:
        class Named(library.MultipleLosses):  # type: ignore[misc]
            def get_indices_tuple(self, i: Any, *given: Any) -> Any:
                return one

        return Named([library.ContrastiveLoss(), library.NTXentLoss()])

    torch.testing.assert_close(mine(losses)(embeddings, labels), mine(pml_losses)(embeddings, labels))
