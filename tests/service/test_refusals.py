"""Bad input is refused over the socket by an error that names what is wrong, and changes nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import distances, losses, miners
from gradbank.component import foundation
from gradbank.errors import (
    GradbankError,
    InvalidComponent,
    InvalidRequest,
    LimitExceeded,
    NonFiniteError,
    SessionConflict,
    SessionNotFound,
)
from gradbank.spec import Spec
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings

NAN, INF = float("nan"), float("inf")
Y = torch.arange(8) % 3


def batch(seed: int = 0, rows: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)), torch.arange(rows) % 3


E = batch()[0]


def with_entries(value: float, *rows: int) -> Tensor:
    bad = E.clone()
    bad[list(rows), 5] = value
    return bad


def memory(rows: int = 64, **more: Any) -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), 16, rows, **more)


@pytest.fixture
def here(server: Server) -> Iterator[gradbank.Client]:
    """A client of this test's own: what it opens is closed with it."""
    with gradbank.connect(server.address, timeout=20) as connected:
        yield connected


def indices(*lists: list) -> dict[str, tuple[Tensor, ...]]:
    return {"indices_tuple": tuple(torch.tensor(each) for each in lists)}


MEMORY, PLAIN, ARC = (
    (lambda: memory()),
    (lambda: losses.NTXentLoss()),
    (lambda: losses.ArcFaceLoss(3, 16).requires_grad_(False)),
)


@pytest.mark.parametrize(
    ("make", "call", "error", "message"),
    [
        # shapes
        (MEMORY, lambda f: f(E[0], Y), InvalidRequest, r"embeddings must be \(batch, dimension\), got shape \(16,\)"),
        (PLAIN, lambda f: f(E[0], Y), InvalidRequest, r"embeddings must be \(batch, dimension\), got shape \(16,\)"),
        (MEMORY, lambda f: f(E[0, 0], Y), InvalidRequest, r"embeddings must be \(batch, dimension\), got shape \(\)"),
        (MEMORY, lambda f: f(E[None], Y), InvalidRequest, r"embeddings must be .*got shape \(1, 8, 16\)"),
        (MEMORY, lambda f: f(E[None] * NAN, Y), InvalidRequest, r"embeddings must be .*got shape \(1, 8, 16\)"),
        (MEMORY, lambda f: f(E[:, :4], Y), InvalidRequest, "dimension 4, but the memory .*embedding_size=16"),
        (ARC, lambda f: f(E[:, :4], Y), InvalidRequest, "dimension 4, but ArcFaceLoss .*embedding_size=16"),
        (PLAIN, lambda f: f(E, Y, ref_emb=E[0], ref_labels=Y), InvalidRequest, "ref_emb"),
        (PLAIN, lambda f: f(E, Y, ref_emb=E[:, :4], ref_labels=Y), InvalidRequest, r"16.*4|4.*16"),
        # lengths
        (MEMORY, lambda f: f(E, Y[:5]), InvalidRequest, r"labels must be \(8,\), one per row .*, got shape \(5,\)"),
        (MEMORY, lambda f: f(E, Y[:, None]), InvalidRequest, r"labels must be \(8,\).* got shape \(8, 1\)"),
        (PLAIN, lambda f: f(E, Y, ref_emb=E, ref_labels=Y[:3]), InvalidRequest, r"ref_labels must be \(8,\)"),
        (MEMORY, lambda f: f(*batch(0, 65)), InvalidRequest, "65 rows do not fit a memory of 64: raise memory_size"),
        (MEMORY, lambda f: f(E, Y, enqueue_mask=Y[:3] > 0), InvalidRequest, r"enqueue_mask must be \(8,\) booleans"),
        # dtypes
        (MEMORY, lambda f: f(E.long(), Y), InvalidRequest, "embeddings must be floating point, got torch.int64"),
        (MEMORY, lambda f: f(E + 0j, Y), InvalidRequest, "dtype torch.complex64 cannot be sent; convert it to one of"),
        (ARC, lambda f: f(E, Y.float()), InvalidRequest, "labels must be integers, got torch.float32"),
        (MEMORY, lambda f: f(E, Y / 2), InvalidRequest, "labels that enter a memory must be whole numbers"),
        (PLAIN, lambda f: f.reset_queue(), InvalidRequest, "NTXentLoss has no queue that could be emptied"),
        (MEMORY, lambda f: f(E, Y, enqueue_mask=Y.float()), InvalidRequest, "enqueue_mask must be .* booleans"),
        (PLAIN, lambda f: f(E, Y, **indices([0.5], [1.0], [2.0])), InvalidRequest, "indices_tuple must hold integers"),
        (MEMORY, lambda f: f(E.tolist(), Y), InvalidRequest, "embeddings must be a tensor, got list"),
        (PLAIN, lambda f: f(E, Y, indices_tuple=([0], [1], [2])), InvalidRequest, "indices_tuple"),
        # values
        (ARC, lambda f: f(E, Y + 1), InvalidRequest, r"labels must be in 0..2 \(num_classes=3\), got 1..3"),
        (ARC, lambda f: f(E, Y - 1), InvalidRequest, r"labels must be in 0..2 \(num_classes=3\), got -1..1"),
        (PLAIN, lambda f: f(E, Y, **indices([0], [1], [8])), InvalidRequest, r"negatives 8 to 8, .*within 0..7"),
        (PLAIN, lambda f: f(E, Y, **indices([0], [-1], [2])), InvalidRequest, r"positives -1 to -1, .*within 0..7"),
        (PLAIN, lambda f: f(E, Y, **indices([0], [1])), InvalidRequest, r"must be \(a, p, n\) .* got 2 tensors"),
        (MEMORY, lambda f: f(E, Y, enqueue_idx=torch.tensor([8])), InvalidRequest, "enqueue_idx"),
        (MEMORY, lambda f: f(with_entries(NAN, 3, 6), Y), NonFiniteError, r"embeddings: row 3 .*\(2 of 8 rows"),
        (PLAIN, lambda f: f(with_entries(INF, 7), Y), NonFiniteError, r"embeddings: row 7 .*\(1 of 8 rows"),
        (ARC, lambda f: f(with_entries(-INF, 0), Y), NonFiniteError, r"row 0 is not finite"),
        (PLAIN, lambda f: f(E, Y, ref_emb=with_entries(NAN, 2), ref_labels=Y), NonFiniteError, "ref_emb: row 2"),
        # what is missing, or does not go together
        (MEMORY, lambda f: f(E, None), InvalidRequest, "labels"),
        (PLAIN, lambda f: f(E), InvalidRequest, "NTXentLoss needs labels, or an indices_tuple"),
        (ARC, lambda f: f(E), InvalidRequest, "ArcFaceLoss needs labels"),
        (ARC, lambda f: f(E, Y, ref_emb=E, ref_labels=Y + 1), InvalidRequest, "takes no ref_emb or ref_labels"),
        (PLAIN, lambda f: f(E, Y, lables=Y), TypeError, "lables"),
    ],
)  # fmt: skip
def test_a_bad_batch_is_refused_and_changes_nothing(
    here: gradbank.Client,
    name: str,
    make: Callable[[], losses.Loss],
    call: Callable[[gradbank.RemoteLoss], Tensor],
    error: type[Exception],
    message: str,
) -> None:
    undisturbed = make()
    there = here.open(name, undisturbed)
    assert torch.equal(there(*batch(1)), undisturbed(*batch(1)))
    with pytest.raises(error, match=message):
        call(there)
    assert here.stats(name).steps == 1
    embeddings, labels = batch(2)
    mine, theirs = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    expected, made = undisturbed(mine, labels), there(theirs, labels)
    assert torch.equal(made, expected)
    (expected.backward(), made.backward())
    assert torch.equal(theirs.grad, mine.grad)
    stats = here.stats(name)
    assert stats.steps == 2
    assert stats.bank_rows == (16 if isinstance(undisturbed, losses.CrossBatchMemory) else 0)


@foundation
class Unregistered(losses.NTXentLoss):
    """A loss that only this process knows."""


class Misspelt(gradbank.losses.NTXentLoss):
    """A loss whose spec asks for what the server does not know."""

    def __init__(self, name: str, **arguments: Any) -> None:
        super().__init__()
        self.asked = Spec(name, arguments)

    def spec(self) -> Any:
        return self.asked


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (Misspelt("NTXentLos"), InvalidComponent, "no component is named 'NTXentLos'; did you mean 'NTXentLoss'"),
        (Misspelt("NTXentLoss", temprature=1.0), InvalidComponent, "did you mean 'temperature'"),
        (Misspelt("NTXentLoss", temperature="hot"), InvalidComponent, "NTXentLoss.temperature: .* got 'hot'"),
        (Misspelt("NTXentLoss", temperature=None), InvalidComponent, "NTXentLoss.temperature: .* got None"),
        (Misspelt("MeanReducer"), InvalidComponent, "a session holds a loss, and MeanReducer is not one"),
        (Misspelt("CrossBatchMemory", embedding_size=0, loss=PLAIN().spec()), InvalidComponent, "embedding_size"),
        (memory(2**40), LimitExceeded, r"memory_size=1099511627776 .*largest memory_size that fits is 119,304,647"),
        (Misspelt("ArcFaceLoss", num_classes=2**40, embedding_size=16), LimitExceeded, "num_classes=1099511627776"),
    ],
)
def test_a_loss_that_cannot_be_hosted_is_refused(
    here: gradbank.Client, name: str, loss: losses.Loss, error: type[GradbankError], message: str
) -> None:
    with pytest.raises(error, match=message):
        here.open(name, loss)
    with pytest.raises(SessionNotFound):
        here.stats(name)


def test_a_loss_of_ones_own_is_refused_with_the_remedy(here: gradbank.Client, name: str) -> None:
    with pytest.raises(
        InvalidComponent, match="Unregistered is not a registered component: decorate it with @component"
    ):
        here.open(name, Unregistered())


def test_a_name_that_is_taken_is_refused_with_the_difference(here: gradbank.Client, name: str) -> None:
    there = here.open(name, memory(miner=miners.MultiSimilarityMiner()))
    there(*batch())
    with pytest.raises(SessionConflict, match=r"session '.*' exists and differs: miner is MultiSimilarityMiner there"):
        here.open(name, memory())
    other = losses.CrossBatchMemory(losses.NTXentLoss(distance=distances.CosineSimilarity(power=2)), 16, 64)
    other.miner = miners.MultiSimilarityMiner()
    with pytest.raises(SessionConflict, match=r"loss.distance.power is 1.* there, and 2.* here"):
        here.open(name, other)
    assert here.stats(name).bank_rows == 8
    there(*batch(1))


def test_a_closed_session_is_named(here: gradbank.Client, name: str) -> None:
    there = here.open(name, memory())
    assert here.close_session(name)
    assert not here.close_session(name)
    with pytest.raises(SessionNotFound, match=f"no session is called '{name}': .*was closed, or the server was"):
        there(*batch())


def test_the_limits_of_a_server_are_told(name: str) -> None:
    settings = ServerSettings(port=0, metrics_port=-1, max_sessions=2, max_step_bytes=2000, max_session_bytes=4500)
    with Server(settings) as small, gradbank.connect(small.address, timeout=10) as client:
        told = client.server()
        assert (told.max_sessions, told.max_step_bytes, told.max_session_bytes) == (2, 2000, 4500)
        there, undisturbed = client.open("a", memory(62)), memory(62)
        with pytest.raises(LimitExceeded, match=r"2,304 bytes, .* 2,000.*--max-step-bytes"):
            there(*batch(0, 32))
        assert torch.equal(there(*batch()), undisturbed(*batch()))
        with pytest.raises(LimitExceeded, match=r"a session may take 4,500: the largest memory_size that fits is 62"):
            client.open("b", memory(63))
        with pytest.raises(LimitExceeded, match=r"the session's state takes .* a session may take 4,500|num_classes"):
            client.open("b", losses.ArcFaceLoss(100, 16))
        client.open("b", memory(62))
        with pytest.raises(LimitExceeded, match=r"all 2 sessions are taken; close one, or .*--max-sessions"):
            client.open("c", memory(62))
        assert [session.name for session in client.sessions()] == ["a", "b"]


def test_more_calls_than_a_server_takes_are_refused_by_name() -> None:
    settings = ServerSettings(port=0, metrics_port=-1, max_streams=2)
    with Server(settings) as small, gradbank.connect(small.address, timeout=2) as client:
        open_losses = [client.open(name, memory()) for name in "abc"]
        for there in open_losses[:2]:
            there(*batch())
        with pytest.raises(LimitExceeded, match=r"all 2 streams are taken; .*--max-streams"):
            open_losses[2](*batch())


def test_a_refusal_that_quotes_a_long_argument_arrives(client: gradbank.Client, name: str) -> None:
    kept = losses.MultipleLosses([losses.NTXentLoss() for _ in range(200)], weights=[0.125] * 200)
    client.open(name, kept)
    other = losses.MultipleLosses([losses.NTXentLoss() for _ in range(200)], weights=[0.25] * 200)
    other.weights[-1] = "x" * 20_000  # which is looked at where it is built
    with pytest.raises((SessionConflict, InvalidComponent, InvalidRequest)) as caught:
        client.open(name, other)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "indices",
    [
        (torch.zeros((), dtype=torch.int64),) * 3,
        (torch.zeros((2, 1), dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)),
    ],
    ids=["a number", "a column"],
)
def test_indices_of_another_shape_are_refused_as_the_trainers(
    client: gradbank.Client, name: str, indices: tuple[torch.Tensor, ...]
) -> None:
    loss_fn = client.open(name, losses.TripletMarginLoss())
    with pytest.raises(InvalidRequest, match="indices_tuple must hold tensors of one dimension"):
        loss_fn(*batch(), indices)


def test_embeddings_of_no_dimension_are_refused(client: gradbank.Client, name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"must be \(batch, dimension\), got shape \(8, 0\)"):
        client.open(name, losses.NTXentLoss())(torch.zeros(8, 0), torch.arange(8))
