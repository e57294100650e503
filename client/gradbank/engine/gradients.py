"""Where the gradients of a step are added up."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Gradients:
    """A tensor for each input that wants a gradient.

    Attributes:
        embeddings: `(B, D)`, or None if it is not wanted.
        pieces: `(M_k, D)` or None, for each piece of the references.
        parameters: the loss's parameters that want one.
    """

    def __init__(
        self, embeddings: Tensor, pieces: Sequence[Tensor], parameters: Sequence[Tensor], needed: Sequence[bool]
    ) -> None:
        of_pieces, of_parameters = needed[1 : 1 + len(pieces)], needed[1 + len(pieces) :]
        self.embeddings = torch.zeros_like(embeddings) if needed[0] else None
        self.pieces = [torch.empty_like(x) if need else None for x, need in zip(pieces, of_pieces)]
        self._written = [0] * len(pieces)  # how many rows of each were written to: a large one is not filled with zeros
        self.parameters = [x for x, need in zip(parameters, of_parameters) if need]
        self._of_parameters: list[Tensor | None] = [None] * len(self.parameters)

    def add_to_piece(self, index: int, rows: slice, more: Tensor) -> None:
        """Adds to the gradient of some rows of a piece; the first to do so goes through them in order."""
        piece = self.pieces[index]
        assert piece is not None
        if rows.start < self._written[index]:
            piece[rows] += more
        else:
            piece[rows] = more
            self._written[index] = rows.stop

    def add_to_parameters(self, made: Sequence[Tensor | None]) -> None:
        """Adds one gradient, or None for zero, for each of `parameters`."""
        for i, more in enumerate(made):
            total = self._of_parameters[i]
            if more is not None:
                self._of_parameters[i] = more.detach().clone() if total is None else total.add_(more)

    def chain(self, output: Tensor | None, gradient: Tensor | None) -> None:
        """Backpropagates the gradient of something that the parameters went into."""
        if output is not None and gradient is not None and output.requires_grad and self.parameters:
            made = torch.autograd.grad(
                output, self.parameters, gradient.to(output.dtype), allow_unused=True, retain_graph=True
            )
            self.add_to_parameters(made)

    def wanted(self) -> list[Tensor | None]:
        """Those that were wanted, in the order of the inputs; None for a parameter that nothing came to."""
        for piece, written in zip(self.pieces, self._written):
            if piece is not None:
                piece[written:] = 0
        return [x for x in (self.embeddings, *self.pieces) if x is not None] + self._of_parameters
