"""Where the gradients of a step are added up."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Gradients:
    """A tensor for each input that wants a gradient.

    Those of embeddings and references, which may be large, are not filled with zeros, but written to from the first
    row on.

    Attributes:
        rows: `(B, D)` for the embeddings and `(M_k, D)` for each piece of the references; None where none is wanted.
        parameters: the loss's parameters that want one.
    """

    def __init__(
        self, embeddings: Tensor, pieces: Sequence[Tensor], parameters: Sequence[Tensor], needed: Sequence[bool]
    ) -> None:
        of_parameters = needed[1 + len(pieces) :]
        self.rows = [torch.empty_like(x) if need else None for x, need in zip((embeddings, *pieces), needed)]
        self._written = [0] * len(self.rows)
        self.parameters = [x for x, need in zip(parameters, of_parameters) if need]
        self._of_parameters: list[Tensor | None] = [None] * len(self.parameters)
        self._through: list[tuple[Tensor, Tensor]] = []

    def goes_through(self, pieces: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Says that the gradients of the references are added up as those of something made of each piece."""
        self._through = list(zip(pieces, made))
        for i, each in enumerate(made, 1):
            self.rows[i] = None if self.rows[i] is None else torch.empty_like(each)

    def add(self, place: int, rows: slice, more: Tensor) -> None:
        """Adds to the gradient of some rows of the input at that place, where one is wanted; the first to add to an
        input goes through its rows in order."""
        total, written = self.rows[place], self._written[place]
        if total is None:
            return
        if rows.start < written:
            total[rows] += more
        else:
            total[written : rows.start] = 0
            total[rows] = more
            self._written[place] = rows.stop

    def add_to_parameters(self, made: Sequence[Tensor | None]) -> None:
        """Adds one gradient, or None for zero, for each of `parameters`."""
        for i, more in enumerate(made):
            total = self._of_parameters[i]
            if more is not None:
                self._of_parameters[i] = more.detach().clone() if total is None else total.add_(more)

    def chain(self, output: Tensor, gradient: Tensor | None, embeddings: Tensor, rows: slice) -> None:
        """Backpropagates the gradient of something that the parameters, or a block's embeddings, went into."""
        if gradient is None or not output.requires_grad:
            return
        wanted = [*self.parameters, *([] if self.rows[0] is None else [embeddings])]
        if not wanted:
            return
        made = torch.autograd.grad(output, wanted, gradient.to(output.dtype), allow_unused=True, retain_graph=True)
        self.add_to_parameters(made[: len(self.parameters)])
        for each in made[len(self.parameters) :]:
            if each is not None:
                self.add(0, rows, each)

    def wanted(self) -> list[Tensor | None]:
        """Those that were wanted, in the order of the inputs; None for a parameter that nothing came to."""
        for total, written in zip(self.rows, self._written):
            if total is not None:
                total[written:] = 0
        for i, (piece, made) in enumerate(self._through, 1):
            total = self.rows[i]
            if total is not None and made is not piece:
                (self.rows[i],) = torch.autograd.grad(made, piece, total)
        return [x for x in self.rows if x is not None] + self._of_parameters
