"""Distances that are called by themselves, as users do to look at them."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from gradbank import distances, losses


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "distance",
    [
        distances.LpDistance(),
        distances.LpDistance(p=1),
        distances.LpDistance(normalize_embeddings=False),
        distances.CosineSimilarity(),
        distances.SNRDistance(),
    ],
    ids=str,
)
def test_half_precision_is_as_exact_as_its_dtype(distance: distances.Distance, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    queries, references = (20 * torch.randn(40, 128)).to(dtype), (20 * torch.randn(30, 128)).to(dtype)
    found, wanted = distance(queries, references), distance(queries.float(), references.float())
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", [8, 300])
def test_equal_rows_have_no_noise(number: int, dtype: torch.dtype) -> None:
    """Their rounding would count, to a reducer that counts what is above 0."""
    torch.manual_seed(0)
    rows = torch.randn(number, 16, dtype=dtype)
    twice, labels = torch.cat([rows, rows]), torch.arange(number).repeat(2) // 2
    assert not bool(distances.SNRDistance()(twice).diagonal(number).any())
    d = distances.SNRDistance()(twice)
    same = (labels[:, None] == labels).fill_diagonal_(False)
    different = labels[:, None] != labels
    far, near = d[same], (0.01 * 20 - d[different]).relu()
    wanted = far[far > 0].mean() + (near[near > 0].mean() if bool((near > 0).any()) else 0)
    loss = losses.SignalToNoiseRatioContrastiveLoss(pos_margin=0, neg_margin=0.2)
    torch.testing.assert_close(loss(twice, labels), wanted)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_ratio_of_noise_can_be_differentiated_twice(normalize: bool) -> None:
    torch.manual_seed(0)
    distance = distances.SNRDistance(normalize_embeddings=normalize)
    queries = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    references = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(distance, (queries, references))
    assert gradgradcheck(distance, (queries, references))
