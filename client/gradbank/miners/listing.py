"""Pairs and triplets, listed block by block in little more memory than the lists take."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from gradbank.distances import Distance
from gradbank.engine.indices import unflattened
from gradbank.miners.rows import matrix


class PairList:
    """Pairs `(anchor, other)`, held as positions in the flattened `(B, M)` matrix until the end."""

    def __init__(self, references: int, device: torch.device) -> None:
        self.references = references
        self.parts = [torch.zeros(0, dtype=torch.int64, device=device)]

    def add(self, flat: Tensor, start: int) -> None:
        """Adds the pairs at these positions of a block that begins with anchor `start`."""
        self.parts.append(flat + start * self.references)

    def flat(self) -> Tensor:
        """All pairs so far, as positions."""
        self.parts = [torch.cat(self.parts)]
        return self.parts[0]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """All pairs so far, as anchors and others."""
        return unflattened(self.flat(), self.references)


class TripletList:
    """Triplets `(a, p, n)`, held as positive pairs and what tells their negatives until the end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: deque[tuple[Tensor, Tensor, Tensor, Callable[[], Tensor]]] = deque()

    def add(self, a: Tensor, p: Tensor, counts: Tensor, negatives: Callable[[], Tensor]) -> None:
        """Adds positive pairs `(a, p)`.

        Args:
            counts: how many negatives each has.
            negatives: what lists them, those of the first pair first; holding them would take half as much again as
                all triplets do.
        """
        self.parts.append((a, p, counts, negatives))

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """All triplets, which the list then holds no longer."""
        size = sum(int(counts.sum()) for _, _, counts, _ in self.parts)
        made = [torch.empty(size, dtype=torch.int64, device=self.device) for _ in range(3)]
        start = 0
        while self.parts:
            a, p, counts, negatives = self.parts.popleft()
            number = int(counts.sum())
            for whole, part in zip(made, (a, p)):
                whole[start : start + number] = part.repeat_interleave(counts, output_size=number)
            made[2][start : start + number] = negatives()
            start += number
        return made[0], made[1], made[2]


def measured_pairs(
    distance: Distance, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """All positive pairs, and all negative pairs: their positions in the flattened `(B, M)` matrix, and distances."""
    number, device = len(ref_emb), embeddings.device
    lists = [PairList(number, device), PairList(number, device)]
    values: list[list[Tensor]] = [[], []]
    for rows, d, *masks in matrix(distance, embeddings, labels, ref_emb, ref_labels):
        for found, parts, mask in zip(lists, values, masks):
            found.add(mask.view(-1).nonzero().squeeze(1), rows.start)
            parts.append(d[mask])
    none = embeddings.new_zeros(0)
    return [(found.flat(), torch.cat(parts) if parts else none) for found, parts in zip(lists, values)]
