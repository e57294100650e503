"""A loss that is still to come."""

import threading
from collections.abc import Callable

from torch import Tensor


class StepFuture:
    """A batch that was submitted; see `RemoteLoss.submit`."""

    def __init__(self, finish: Callable[[], Tensor], check: Callable[[], object]) -> None:
        self._finish: Callable[[], Tensor] | None = finish
        self._check = check
        self._asking = threading.Lock()
        self._loss: Tensor | None = None

    def result(self) -> Tensor:
        """The loss, which backpropagates to the batch; waits for it, for as long as a step may take.

        Raises:
            GradbankError: the step was refused, or not answered in time; asking again says the same.
        """
        if self._loss is not None:
            return self._loss
        self._check()  # before the lock, which a fork may have copied while it was held
        with self._asking:  # two losses of one answer would share its gradients
            if self._finish is not None:
                self._loss, self._finish = self._finish(), None  # which holds the batch as it was sent
            assert self._loss is not None  # it is finished
            return self._loss
