"""A loss that is still to come."""

import threading
from collections.abc import Callable

from torch import Tensor


class StepFuture:
    """A batch that was submitted; see `RemoteLoss.submit`."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish, self._asking = finish, threading.Lock()
        self._loss: Tensor | None = None

    def result(self) -> Tensor:
        """The loss, which backpropagates to the batch; waits for it, for as long as a step may take.

        Raises:
            GradbankError: the step was refused, or not answered in time; asking again says the same.
        """
        with self._asking:  # two losses of one answer would share its gradients
            if self._loss is None:
                self._loss = self._finish()
            return self._loss
