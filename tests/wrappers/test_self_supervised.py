"""SelfSupervisedLoss: two views of each sample, as PML compares them."""

from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from torch import Tensor, nn

from gradbank import losses, regularizers
from gradbank.wrappers import BaseLossWrapper, SelfSupervisedLoss, SelfSupervisedLossWrapper

SUPPORTED = pml_losses.SelfSupervisedLoss.supported_losses()


def views(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(2, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return drawn[0], drawn[1]


def answers(loss: nn.Module, *given: Tensor) -> list[Tensor]:
    leaves = [each.clone().requires_grad_() for each in given]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("symmetric", [True, False])
def test_views_are_compared_as_in_pml(name: str, symmetric: bool) -> None:
    ours, theirs = (
        library.SelfSupervisedLoss(getattr(library, name)(), symmetric=symmetric) for library in (losses, pml_losses)
    )
    found, wanted = answers(ours, *views()), answers(theirs, *views())
    assert len(found) == 3
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_the_losses_of_pml_are_supported() -> None:
    assert set(SelfSupervisedLoss.supported_losses()) > set(SUPPORTED)
    for name in SelfSupervisedLoss.supported_losses():
        SelfSupervisedLoss.check_loss_support(name)
        if hasattr(losses, name):  # or it is of another test
            SelfSupervisedLoss(getattr(losses, name)())
    with pytest.raises(ValueError, match="SelfSupervisedLoss does not support ArcFaceLoss"):
        SelfSupervisedLoss.check_loss_support("ArcFaceLoss")


def test_a_subclass_of_a_supported_loss_is_supported() -> None:
    class Own(losses.NTXentLoss):
        pass

    assert torch.equal(SelfSupervisedLoss(Own(0.5))(*views()), SelfSupervisedLoss(losses.NTXentLoss(0.5))(*views()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.ArcFaceLoss(3, 6),
        lambda: losses.VICRegLoss(),
        lambda: losses.CrossBatchMemory(losses.NTXentLoss(), 6),
        lambda: losses.MultipleLosses([losses.NTXentLoss()]),
    ],
)
def test_other_losses_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="SelfSupervisedLoss does not support"):
        SelfSupervisedLoss(make())


@pytest.mark.parametrize("shape", [(8, 6), (9, 5), (9,)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_views_of_different_shapes_are_refused(shape: tuple[int, ...], symmetric: bool) -> None:
    with pytest.raises(ValueError, match=r"ref_emb must be \(9, 6\), another view of each row"):
        SelfSupervisedLoss(losses.NTXentLoss(), symmetric)(views()[0], torch.ones(shape))


def test_a_regularizer_sees_what_the_anchors_are() -> None:
    cost, (first, second) = regularizers.LpRegularizer(), views()
    for symmetric, anchors in ((True, torch.cat([first, second])), (False, first)):
        plain = SelfSupervisedLoss(losses.NTXentLoss(), symmetric)
        with_cost = SelfSupervisedLoss(
            losses.NTXentLoss(), symmetric, embedding_regularizer=cost, embedding_reg_weight=2
        )
        torch.testing.assert_close(with_cost(first, second), plain(first, second) + 2 * cost(anchors))


def test_half_precision_is_computed_in_float32() -> None:
    half = views(torch.float16)
    loss = SelfSupervisedLoss(losses.NTXentLoss())
    assert torch.equal(loss(*half), loss(*(each.float() for each in half)))


def test_the_older_wrapper_takes_labels() -> None:
    embeddings, labels = views()[0], torch.arange(9) // 2
    for loss in (losses.NTXentLoss(), losses.TripletMarginLoss()):
        found = SelfSupervisedLossWrapper(loss)(embeddings, labels)
        assert torch.equal(found, loss(embeddings, labels))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_older_wrapper_takes_another_view(symmetric: bool) -> None:
    first, second = views()
    wanted = SelfSupervisedLoss(losses.NTXentLoss(), symmetric)(first, second)
    older = SelfSupervisedLossWrapper(losses.NTXentLoss(), symmetric)
    assert torch.equal(older(first, second), wanted)
    assert torch.equal(older(first, ref_emb=second), wanted)


@pytest.mark.parametrize("given", [{}, {"labels": torch.arange(9), "ref_emb": torch.ones(9, 6)}])
def test_the_older_wrapper_takes_one_of_labels_and_view(given: Any) -> None:
    with pytest.raises(ValueError, match="either labels or ref_emb"):
        SelfSupervisedLossWrapper(losses.NTXentLoss())(views()[0], **given)


def test_a_wrapper_of_ones_own_says_what_it_supports() -> None:
    class Own(BaseLossWrapper):
        @staticmethod
        def supported_losses() -> list[str]:
            return ["SupConLoss"]

        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            wrapped: Tensor = self.loss(embeddings, labels)
            return wrapped * 2

    labels = torch.arange(9) // 2
    assert torch.equal(Own(losses.SupConLoss())(views()[0], labels), losses.SupConLoss()(views()[0], labels) * 2)
    with pytest.raises(ValueError, match="Own does not support NTXentLoss; it does SupConLoss"):
        Own(losses.NTXentLoss())


@pytest.mark.parametrize("kind", [SelfSupervisedLoss, SelfSupervisedLossWrapper])
def test_wrappers_are_built_again_from_their_arguments(kind: Any) -> None:
    loss = kind(losses.NTXentLoss(0.3), symmetric=False)
    assert loss.spec().title() == f"{kind.__name__}(NTXentLoss)"
    copy = loss.rebuilt()
    assert copy.spec() == loss.spec()
    assert torch.equal(copy(*views()), loss(*views()))


@pytest.mark.parametrize("given", [{}, {"ref_emb": torch.ones(9, 6), "labels": torch.arange(9)}])
def test_two_views_are_needed_and_no_labels(given: Any) -> None:
    with pytest.raises(ValueError, match=r"takes two views, .* makes the labels itself"):
        SelfSupervisedLoss(losses.NTXentLoss()).stage(views()[0], **given)
