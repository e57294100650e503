"""A loss on a server behaves under autograd as the same loss does here."""

import copy
import io
import pickle
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gradbank
from gradbank import losses, reducers
from gradbank.errors import InvalidRequest, SessionConflict
from gradbank.v1 import stats_pb2

Batch = tuple[torch.Tensor, torch.Tensor]


def memory() -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), 16, 64)


def batch(seed: int = 0, rows: int = 8, dtype: torch.dtype = torch.float32) -> Batch:
    made = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, 16, generator=made).to(dtype)
    return embeddings.requires_grad_(), torch.randint(0, 4, (rows,), generator=made)


@pytest.fixture
def pair(either: gradbank.Client, name: str) -> Callable[..., tuple[gradbank.RemoteLoss, losses.Loss]]:
    """A loss on a server, and an equal one here."""
    return lambda here: (either.open(name, here), here)


Pair = Callable[..., tuple[gradbank.RemoteLoss, losses.Loss]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_floating_dtype_gives_what_it_gives_here(pair: Pair, dtype: torch.dtype) -> None:
    there, here = pair(memory())
    for seed in range(3):
        (mine, labels), (theirs, _) = batch(seed, dtype=dtype), batch(seed, dtype=dtype)
        expected, made = here(mine, labels), there(theirs, labels)
        expected.backward()
        made.backward()
        assert made.dtype == expected.dtype
        assert torch.equal(made, expected)
        assert theirs.grad.dtype == dtype
        assert torch.equal(theirs.grad, mine.grad)


@pytest.mark.parametrize(
    "view",
    [
        lambda e: e.T.contiguous().T,
        lambda e: e.repeat(1, 2)[:, ::2],
        lambda e: e.flip(0),
        lambda e: e[:1].expand(8, 16),
        lambda e: e[:0],
    ],
    ids=["transposed", "strided", "flipped", "expanded", "empty"],
)
def test_any_layout_will_do(pair: Pair, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    there, here = pair(losses.NTXentLoss())
    (mine, labels), (theirs, _) = batch(), batch()
    for loss_fn, leaf in ((here, mine), (there, theirs)):
        seen = view(leaf)
        loss_fn(seen, labels[: len(seen)]).backward()
    torch.testing.assert_close(theirs.grad, mine.grad)  # here, torch multiplies by layout, and rounds by it


def test_labels_of_32_bits_will_do(pair: Pair) -> None:
    there, here = pair(memory())
    embeddings, labels = batch()
    assert torch.equal(there(embeddings, labels.int()), here(embeddings, labels.int()))


def test_without_grad_no_gradient_travels(pair: Pair, either: gradbank.Client, name: str) -> None:
    there, _ = pair(memory())
    with torch.no_grad():
        loss = there(*batch())
    assert not loss.requires_grad
    assert not there(batch()[0].detach(), batch()[1]).requires_grad
    assert either.stats(name).sent_bytes == 0
    assert either.stats(name).bank_rows == 16


def test_gradients_accumulate_and_flow_through_the_network(pair: Pair) -> None:
    there, here = pair(memory())
    grads = []
    for loss_fn in (there, here):
        torch.manual_seed(1)
        network = torch.nn.Linear(16, 16)
        for seed in range(3):
            embeddings, labels = batch(seed)
            (loss_fn(network(embeddings), labels) / 3).backward()
        grads.append(network.weight.grad)
    torch.testing.assert_close(*grads)


def test_a_loss_may_be_part_of_another(pair: Pair) -> None:
    there, here = pair(losses.NTXentLoss())
    grads = []
    for loss_fn in (there, here):
        embeddings, labels = batch()
        (2 * loss_fn(embeddings, labels) + embeddings.square().sum()).backward()
        grads.append(embeddings.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_scaled_loss_has_scaled_gradients(pair: Pair, dtype: torch.dtype) -> None:
    """Whatever an AMP scaler starts with must not overflow what would not overflow here."""
    there, here = pair(losses.NTXentLoss(temperature=1.0))
    grads = []
    for loss_fn in (there, here):
        embeddings, labels = batch(dtype=dtype)
        (loss_fn(embeddings, labels) * 65536.0).backward()
        grads.append(embeddings.grad)
    assert bool(grads[1].isfinite().all())
    torch.testing.assert_close(*grads, rtol=5e-2, atol=1e-2)


def test_gradients_of_gradients_are_refused(pair: Pair) -> None:
    there, _ = pair(losses.NTXentLoss())
    embeddings, labels = batch()
    loss = there(embeddings, labels)

    def penalized() -> None:
        (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
        (loss + gradient.square().sum()).backward()  # a penalty that would do nothing, and not say so

    with pytest.raises(RuntimeError, match=r"(?i)gradients? of gradients?|once_differentiable"):
        penalized()


def test_references_get_their_gradient(pair: Pair) -> None:
    there, here = pair(losses.NTXentLoss())
    grads = []
    for loss_fn in (there, here):
        (embeddings, labels), (references, ref_labels) = batch(), batch(1, 12)
        loss_fn(embeddings, labels, ref_emb=references, ref_labels=ref_labels).backward()
        grads += [embeddings.grad, references.grad]
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[3])


def test_rows_may_only_enter_or_only_be_compared(pair: Pair) -> None:
    there, here = pair(memory())
    mask = torch.arange(8) % 2 == 0
    for arguments in ({"enqueue_mask": mask}, {"enqueue_idx": torch.tensor([0, 3])}, {}):
        (mine, labels), (theirs, _) = batch(), batch()
        expected, made = here(mine, labels, **arguments), there(theirs, labels, **arguments)
        (expected.backward(), made.backward())
        assert torch.equal(made, expected)
        assert torch.equal(theirs.grad, mine.grad)
    with pytest.raises(InvalidRequest, match="pass one of them"):
        there(*batch(), enqueue_mask=mask, enqueue_idx=torch.tensor([0]))


def test_opening_takes_weights_and_a_filled_bank_along(either: gradbank.Client, name: str) -> None:
    here, arc = memory(), losses.ArcFaceLoss(4, 16).requires_grad_(False)
    here(*batch())
    there, there_arc = either.open(name, here), either.open(name + "-arc", arc)
    assert torch.equal(there(*batch(1)), here(*batch(1)))
    assert torch.equal(there_arc(*batch(1)), arc(*batch(1)))
    copy = there.local()
    assert torch.equal(copy(*batch(2)), here(*batch(2)))
    assert either.stats(name).steps == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_stay_of_their_dtype(either: gradbank.Client, name: str, dtype: torch.dtype) -> None:
    here = losses.CrossBatchMemory(losses.MarginLoss(learn_beta=True, num_classes=5, beta=0.7), 16, 20)
    with torch.no_grad():
        here.loss.beta += torch.rand(5)
    here.to(dtype)
    there = either.open(name, here)
    embeddings, labels = torch.randn(12, 16, dtype=torch.float64), torch.arange(12) % 5
    assert torch.equal(there(embeddings, labels), here(embeddings, labels))
    copy = there.local()
    assert copy.loss.beta.dtype == dtype
    assert torch.equal(copy(embeddings, labels), here(embeddings, labels))


def test_a_loss_on_a_server_is_a_module_without_weights(pair: Pair) -> None:
    there, _ = pair(losses.ArcFaceLoss(4, 16))
    assert list(there.parameters()) == []
    with pytest.warns(UserWarning, match=r"empty: .* are the server's, and loss_fn.local\(\).state_dict\(\) has them"):
        assert there.state_dict() == {}
    assert torch.nn.ModuleDict({"loss": there}).state_dict() == {}  # said once
    assert "ArcFaceLoss" in repr(there)
    assert set(there.timings) == set()


def test_weights_that_nothing_trains_are_pointed_out_once(pair: Pair) -> None:
    there, _ = pair(losses.ArcFaceLoss(4, 16))
    embeddings, labels = batch()
    there(embeddings.detach(), labels)  # somebody looks, and trains nothing
    with pytest.warns(UserWarning, match=r"ArcFaceLoss are the server's, and nobody .*loss_fn.optimizer\(") as warned:
        there(embeddings, labels)
    assert warned[0].filename == __file__  # it points at who calls
    with warnings.catch_warnings(action="error"):
        there(embeddings, labels)
        trained, _ = pair(losses.ArcFaceLoss(4, 16))
        trained.optimizer("SGD", lr=0.1)
        trained(embeddings, labels)


def test_an_optimizer_of_a_loss_that_was_opened_anew_says_so(either: gradbank.Client, name: str) -> None:
    first = either.open(name, losses.ArcFaceLoss(4, 16))
    forgotten = first.optimizer("SGD", lr=0.1)
    first(*batch()).backward()
    second = either.open(name, losses.ArcFaceLoss(4, 16))
    with pytest.raises(InvalidRequest, match=r"of a loss that was opened anew: make one by loss_fn\.optimizer"):
        forgotten.step()
    second.optimizer("SGD", lr=0.1)
    assert second(*batch()).isfinite()


def test_an_optimizer_may_be_asked_for_again_with_its_defaults(either: gradbank.Client, name: str) -> None:
    first = either.open(name, losses.ArcFaceLoss(4, 16))
    optimizer = first.optimizer("SGD", lr=0.1)
    assert first.optimizer("SGD", lr=0.1, nesterov=False) is optimizer
    with pytest.raises(SessionConflict, match=r"already, not SGD\(.*0.05.*\): .*param_groups\[0\]"):
        first.optimizer("SGD", lr=0.05)
    other = either.open(name, losses.ArcFaceLoss(4, 16), rank=1)
    with pytest.raises(SessionConflict, match=r"to go on with other options.*param_groups\[0\]"):
        other.optimizer("SGD", lr=0.05)
    other.optimizer("SGD", lr=0.1, momentum=0.0)


def test_the_network_is_not_what_the_trainer_did_meanwhile(pair: Pair) -> None:
    there, _ = pair(losses.NTXentLoss())
    there(*batch())
    assert there.timings["network"] < 0.25
    future = there.submit(*batch(1))
    time.sleep(0.3)
    future.result()
    assert there.timings.get("network", 0) < 0.25
    there(*batch(2))
    stats = there.producer.transport().call("GetStats", stats_pb2.GetStatsRequest(session=there.name), 20).stats
    assert stats.mean_trainer_timings.network_s < 0.1


def test_a_rank_may_be_a_number_of_numpy(either: gradbank.Client, name: str) -> None:
    assert either.open(name, losses.NTXentLoss(), rank=np.int64(3))(*batch()).isfinite()
    with pytest.raises(InvalidRequest, match="whole number from 0 on, got True"):
        either.open(name, losses.NTXentLoss(), rank=True)


def test_a_step_says_where_its_time_went(pair: Pair) -> None:
    there, _ = pair(losses.NTXentLoss())
    begun = time.perf_counter()
    there(*batch())
    took, spent = time.perf_counter() - begun, there.timings
    assert list(spent) == ["client_encode", "network", "queue", "decode", "compute", "encode", "client_decode"]
    assert all(seconds >= 0 for seconds in spent.values())
    assert 0 < sum(spent.values()) <= took


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps, lambda each: torch.save(each, io.BytesIO())])
def test_what_lives_on_the_server_is_not_copied(
    client: gradbank.Client, name: str, copied: Callable[[object], object]
) -> None:
    head = client.open(name, losses.ArcFaceLoss(4, 16))
    optimizer = head.optimizer("SGD", lr=0.1)
    with pytest.raises(TypeError, match=f"the hosted loss '{name}' is a connection"):
        copied(head)
    with pytest.raises(TypeError, match="is a connection"):
        copied(torch.nn.Sequential(torch.nn.Linear(2, 2), head))
    with pytest.raises(TypeError, match="the optimizer of a hosted loss can be neither copied nor pickled"):
        copied(optimizer)


def test_weights_on_the_server_are_one_group(client: gradbank.Client, name: str) -> None:
    head = client.open(name, losses.ArcFaceLoss(4, 16))
    optimizer = head.optimizer("SGD", lr=0.1)
    with pytest.raises(InvalidRequest, match="give other parameters their own optimizer"):
        optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    assert len(optimizer.param_groups) == 1


def test_sparse_embeddings_are_refused_by_name(anyway: gradbank.Client, name: str) -> None:
    there = anyway.open(name, losses.NTXentLoss())
    with pytest.raises(InvalidRequest, match=r"layout torch.sparse_coo cannot be sent; make it dense"):
        there(batch(0)[0].detach().to_sparse(), batch(0)[1])


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (torch.optim.SGD, 'made by its name, as .*"SGD", lr=0.1.*, got the class SGD'),
        (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), "got a SGD"),
        ("sgd", "did you mean 'SGD'"),
        ("LBFGS", "no optimizer is called 'LBFGS'"),
    ],
)
def test_an_optimizer_is_made_by_its_name(client: gradbank.Client, name: str, optimizer: Any, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        client.open(name, losses.ArcFaceLoss(2, 4)).optimizer(optimizer, lr=0.1)


def test_frozen_weights_are_not_given_an_optimizer(client: gradbank.Client, name: str) -> None:
    head = losses.ArcFaceLoss(4, 16)
    head.W.requires_grad_(False)
    there = client.open(name, head)
    with pytest.raises(InvalidRequest, match="W requires no gradient here, and the server would step all weights"):
        there.optimizer("SGD", lr=1.0)
    head.W.requires_grad_(True)
    there.optimizer("SGD", lr=1.0)


def test_an_optimizer_takes_no_state_that_it_could_not_use(client: gradbank.Client, name: str) -> None:
    head = losses.ArcFaceLoss(4, 16)
    optimizer, here = client.open(name, head).optimizer("SGD", lr=1.0, momentum=0.9), losses.ArcFaceLoss(4, 16)
    own = torch.optim.SGD(here.parameters(), lr=0.5, momentum=0.9)
    here(torch.randn(8, 16), torch.arange(8) % 4).backward()
    own.step()
    with pytest.raises(InvalidRequest, match="keeps its state on the server, which takes none from here"):
        optimizer.load_state_dict(own.state_dict())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.25
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_reducer_that_gives_no_number_is_refused(client: gradbank.Client, name: str) -> None:
    there = client.open(name, losses.TripletMarginLoss(reducer=reducers.DoNothingReducer()))
    with pytest.raises(InvalidRequest, match="gives one number, and the reducer of TripletMarginLoss gives dict"):
        there(torch.randn(8, 16), torch.arange(8) % 4)
    assert client.stats(name).rejected == 1
