"""FaissKNN and FaissKMeans: as torch finds it, and what is said without faiss."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gradbank.evaluation import AccuracyCalculator, ExactKNN, FaissKMeans, FaissKNN, InferenceModel, KMeans
from gradbank.evaluation import faiss as module


def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    for made in (FaissKNN, FaissKMeans):
        with pytest.raises(ImportError, match=r'pip install "gradbank\[cpu\]"'):
            made()
    assert type(InferenceModel(nn.Identity()).knn_func) is ExactKNN
    assert type(AccuracyCalculator().kmeans_func) is KMeans


def test_gpus_are_a_list_of_one_or_more() -> None:
    with pytest.raises(TypeError, match="must be a list"):
        FaissKNN(gpus=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name one at least"):
        FaissKNN(gpus=[])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("budget", [1 << 21, 40])
def test_neighbours_are_the_exact_ones(monkeypatch: pytest.MonkeyPatch, own: bool, budget: int) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(module, "BUDGET", budget)
    torch.manual_seed(0)
    reference = torch.randn(60, 5)
    query = reference[:20] if own else torch.randn(20, 5)
    knn = FaissKNN()
    far, rows = knn(query, 6, reference, own)
    exact, expected = ExactKNN()(query, 6, reference, own)
    assert torch.equal(rows, expected)
    torch.testing.assert_close(far, exact, atol=1e-5, rtol=1e-5)
    assert knn.index is None


def test_scores_are_those_of_the_exact_neighbours(digits: tuple[Tensor, Tensor]) -> None:
    pytest.importorskip("faiss")
    images, labels = digits
    given = torch.nn.functional.normalize(images), labels  # as they are, many distances tie
    retrieval = {"exclude": ("NMI", "AMI"), "device": "cpu"}
    by_default = AccuracyCalculator(device="cpu")
    assert type(by_default.knn_func) is FaissKNN
    assert type(by_default.kmeans_func) is FaissKMeans
    found = by_default.get_accuracy(*given)
    wanted = AccuracyCalculator(knn_func=ExactKNN(), **retrieval).get_accuracy(*given)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert found["NMI"] > found["AMI"] > 0.6


def test_an_index_of_ones_own_is_kept_where_asked() -> None:
    faiss = pytest.importorskip("faiss")
    knn = FaissKNN(reset_after=False, index_init_fn=faiss.IndexFlatIP)
    points = torch.nn.functional.normalize(torch.randn(40, 4))
    AccuracyCalculator(exclude=("NMI", "AMI"), knn_func=knn, device="cpu").get_accuracy(points, torch.arange(40) % 4)
    assert isinstance(knn.index, faiss.IndexFlatIP)
    assert knn.index.ntotal == 40


def test_an_index_that_must_be_trained_is() -> None:
    faiss = pytest.importorskip("faiss")
    knn = FaissKNN(
        reset_before=False,
        reset_after=False,
        index_init_fn=lambda d: faiss.IndexIVFFlat(faiss.IndexFlatL2(d), d, 1),
    )
    points = torch.randn(50, 4)
    knn.train(points)
    assert torch.equal(knn(points, 3)[1], ExactKNN()(points, 3, points)[1])


def test_stored_references_are_saved_loaded_and_added_to(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    torch.manual_seed(0)
    x = torch.randn(20, 4)
    inference = InferenceModel(nn.Identity(), data_device="cpu")
    assert type(inference.knn_func) is FaissKNN
    with pytest.raises(ValueError, match="there is no index: make one"):
        inference.get_nearest_neighbors(x, 1)
    with pytest.raises(ValueError, match="no index to add to"):
        inference.add_to_knn(x)
    inference.train_knn(x[:12])
    inference.add_to_knn(x[12:])
    inference.save_knn_func(tmp_path / "index")
    loaded = InferenceModel(nn.Identity(), data_device="cpu")
    loaded.load_knn_func(tmp_path / "index")
    by_hand = InferenceModel(nn.Identity(), data_device="cpu")
    by_hand.knn_func.index = faiss.IndexFlatL2(4)
    by_hand.add_to_knn(x)
    for each in (inference, loaded, by_hand):
        assert each.get_nearest_neighbors(x, 1)[1][:, 0].tolist() == list(range(20))


def test_faiss_clusters_as_its_arguments_say(digits: tuple[Tensor, Tensor]) -> None:
    pytest.importorskip("faiss")
    images, _ = digits
    clusters = FaissKMeans(niter=5, seed=3)(images, 10)
    assert clusters.dtype == torch.int64
    assert sorted(clusters.unique().tolist()) == list(range(10))
    assert torch.equal(FaissKMeans(niter=5, seed=3)(images, 10), clusters)
    assert not torch.equal(FaissKMeans(niter=5, seed=4)(images, 10), clusters)


def test_what_uses_faiss_can_be_copied_and_pickled(digits: tuple[Tensor, Tensor]) -> None:
    pytest.importorskip("faiss")
    images, labels = digits[0][:100], digits[1][:100]
    made = AccuracyCalculator(k="max_bin_count", device="cpu")
    wanted = made.get_accuracy(images, labels)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.get_accuracy(images, labels) == wanted
