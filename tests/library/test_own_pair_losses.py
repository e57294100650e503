"""Losses of a user's own on GenericPairLoss, with the hooks that PML calls: one text, run with either library."""

from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import torch
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_pairs
from torch import Tensor

from gradbank import component, losses


def written(library: Any) -> dict[str, Any]:
    class Doubled(library.GenericPairLoss):  # type: ignore[misc]
        """Makes the masks itself."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(mat_based_loss=True, **kwargs)

        def _compute_loss(self, mat: Tensor, pos_mask: Tensor, neg_mask: Tensor) -> Any:
            cost = (mat * pos_mask - mat * neg_mask).sum(1).exp()
            return {"loss": {"losses": cost, "indices": torch.arange(len(mat)), "reduction_type": "element"}}

        def mat_based_loss(self, mat: Tensor, indices_tuple: Any) -> Any:
            a1, p, a2, n = indices_tuple
            pos_mask, neg_mask = torch.zeros_like(mat), torch.zeros_like(mat)
            pos_mask[a1, p], neg_mask[a2, n] = 2, 1
            return self._compute_loss(mat, pos_mask, neg_mask)

    class Hardest(library.GenericPairLoss):  # type: ignore[misc]
        """Keeps some of the pairs."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(mat_based_loss=False, **kwargs)

        def _compute_loss(self, pos_pair: Tensor, neg_pair: Any, indices_tuple: Any) -> Any:
            return {"loss": {"losses": pos_pair, "indices": indices_tuple[:2], "reduction_type": "pos_pair"}}

        def pair_based_loss(self, mat: Tensor, indices_tuple: Any) -> Any:
            a1, p, a2, n = indices_tuple
            kept = mat[a1, p].topk(len(a1) // 3).indices
            return self._compute_loss(mat[a1, p][kept], None, (a1[kept], p[kept], a2, n))

    class Chosen(Doubled):
        """Chooses the pairs, and leaves the rest to whichever method there is."""

        def compute_loss(self, embeddings: Tensor, labels: Any, indices: Any, ref_emb: Any, ref_labels: Any) -> Any:
            return self.loss_method(self.distance(embeddings, ref_emb), convert_to_pairs(indices, labels, ref_labels))

    return {each.__name__: each for each in (Doubled, Hardest, Chosen)}


@pytest.mark.parametrize("name", ["Doubled", "Hardest", "Chosen"])
def test_a_hook_of_ones_own_is_called_as_in_pml(name: str) -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(24, 8), torch.arange(24) % 6
    ours, theirs = (embeddings.clone().requires_grad_() for _ in range(2))
    found = written(losses)[name]()(ours, labels)
    wanted = written(pml_losses)[name]()(theirs, labels)
    torch.testing.assert_close(found, wanted)
    found.backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@component
class Halved(losses.GenericPairLoss):
    """Costs half of an anchor's distances to its positives."""

    def _compute_loss(self, mat: Tensor, pos_mask: Tensor, neg_mask: Tensor) -> Any:
        cost = (mat * pos_mask).sum(1)
        return {"loss": {"losses": cost, "indices": torch.arange(len(mat)), "reduction_type": "element"}}

    def mat_based_loss(self, mat: Tensor, indices_tuple: Any) -> Any:
        return super().mat_based_loss(mat / 2, indices_tuple)


def test_a_component_has_the_method_and_tells_the_argument() -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(12, 4), torch.arange(12) % 3
    loss = Halved(mat_based_loss=True)
    same = (labels[:, None] == labels).float().fill_diagonal_(0)
    wanted = (loss.distance(embeddings) * same).sum(1).mean() / 2
    assert loss.spec().arguments["mat_based_loss"] is True
    for each in (loss, loss.rebuilt()):
        torch.testing.assert_close(each(embeddings, labels), wanted)
