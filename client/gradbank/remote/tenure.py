"""A rank of a session, as one trainer holds it: under a nonce, in an epoch, up to a step."""

import secrets
from collections.abc import Callable

from torch import Tensor

from gradbank.errors import SessionNotFound
from gradbank.remote.ticket import News
from gradbank.remote.transport import Transport
from gradbank.v1 import session_pb2, step_pb2
from gradbank.wire import state_of


class Tenure:
    """What a trainer holds of a session from `attach` on.

    Args:
        transport: gives the transport, or raises if this process may not use it.
        incarnation: greater than that of any trainer that held the rank before.

    Attributes:
        nonce: that by which the rank is held; renewed: that by which it is asked for again, if it is.
        epoch, last_seq: of the rank, as far as the server has told.
        max_step_bytes: how many the tensors of a step may take.
    """

    def __init__(
        self, transport: Callable[[], Transport], session: str, rank: int, nonce: bytes, incarnation: int
    ) -> None:
        self.session, self.rank = session, rank
        self._transport, self._incarnation = transport, incarnation
        self.nonce, self.renewed = nonce, b""
        self.epoch = self.last_seq = self.max_step_bytes = 0

    def attach(self, timeout: float, before: "Tenure | None" = None) -> None:
        """Takes the rank; asking again changes nothing.

        Args:
            before: that which had it until now by the same client, whatever the clock says.

        Raises:
            Fenced: a newer trainer holds it.
            SessionNotFound: the session is gone.
        """
        held = self._attached(self.nonce, b"" if before is None else before.nonce, timeout)
        self.epoch, self.last_seq, self.max_step_bytes = held.epoch, held.last_seq, held.max_step_bytes

    def attached_anew(self, timeout: float) -> session_pb2.AttachSessionResponse:
        """A new epoch, which is not that of this tenure yet: nothing that was sent before can be carried out from now
        on."""
        self.renewed = self.renewed or secrets.token_bytes(16)  # the same one, should this have to be asked again
        return self._attached(self.renewed, self.nonce, timeout)

    def check_renewed(self, held: session_pb2.AttachSessionResponse) -> None:
        """Refuses, by SessionNotFound, what another session made of it."""
        if held.epoch != self.epoch + 1:  # which is what a session that knows the nonce makes of it
            raise SessionNotFound(f"session {self.session!r} ended, and another has its name now: open it again")

    def numbered(self, step: step_pb2.StepInput, ahead: int, news: News) -> step_pb2.StepInput:
        """The step as it will be sent, with so many of them ahead of it."""
        numbered = step_pb2.StepInput()
        numbered.CopyFrom(step)
        numbered.session, numbered.rank, numbered.epoch = self.session, self.rank, self.epoch
        numbered.seq = self.last_seq + ahead + 1
        numbered.answered_seq = self.last_seq
        numbered.weight_events.extend(news.events)
        return numbered

    def configure(self, optimizer: session_pb2.Optimizer, timeout: float) -> None:
        """Gives the session's weights an optimizer."""
        request = session_pb2.ConfigureOptimizerRequest(session=self.session, optimizer=optimizer)
        self._transport().call("ConfigureOptimizer", request, timeout)

    def pull(self, timeout: float) -> dict[str, Tensor]:
        """The session's state: weights and bank."""
        request = session_pb2.PullStateRequest(session=self.session)
        state, payload = self._transport().pull_state(request, timeout)
        return {name: value.clone() for name, value in state_of(state, payload).items()}  # to be kept, each by itself

    def _attached(self, nonce: bytes, previous_nonce: bytes, timeout: float) -> session_pb2.AttachSessionResponse:
        request = session_pb2.AttachSessionRequest(
            session=self.session,
            rank=self.rank,
            incarnation=self._incarnation,
            nonce=nonce,
            previous_nonce=previous_nonce,
        )
        held: session_pb2.AttachSessionResponse = self._transport().call("AttachSession", request, timeout)
        return held
