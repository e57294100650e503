"""A fixed set of triplets, where nothing else is known of the items."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from gradbank.samplers.random import Labels, SamplingError, choose, groups, source


class FixedSetOfTriplets(Sampler[int]):
    """Yields the anchor, positive and negative of one triplet, then of the next; each epoch in another order.

    The triplets are drawn once: two classes, then two items of the first and one of the second. An anchor whose
    class has no other item is its own positive.

    Args:
        labels: `(N,)`, the class of each item.
        num_triplets: how many triplets.
        generator: where to draw from; numpy's global generator by default.

    Raises:
        SamplingError: also a ValueError and an AssertionError: no triplet, or fewer than two classes.
    """

    def __init__(self, labels: Labels, num_triplets: int, generator: torch.Generator | None = None) -> None:
        self.labels_to_indices = groups(labels)
        self.num_triplets = int(num_triplets)
        self.generator = generator
        if self.num_triplets < 1:
            raise SamplingError(f"num_triplets must be at least 1, got {num_triplets}")
        if len(self.labels_to_indices) < 2:
            raise SamplingError("triplets need items of two classes at least, got one class")
        self.create_fixed_set_of_triplets()

    def __len__(self) -> int:
        return 3 * self.num_triplets

    def __iter__(self) -> Iterator[int]:
        source(self.generator).shuffle(self.fixed_set_of_triplets)
        return iter(self.fixed_set_of_triplets.flatten().tolist())

    def create_fixed_set_of_triplets(self) -> None:
        """Draws the triplets, `(num_triplets, 3)` int64, anew."""
        random = source(self.generator)
        items = list(self.labels_to_indices.values())
        triplets = np.empty((self.num_triplets, 3), dtype=np.int64)
        for triplet in triplets:
            own, other = random.choice(len(items), size=2, replace=False)
            triplet[:2] = choose(random, items[own], 2)
            triplet[2] = random.choice(items[other], replace=False)
        self.fixed_set_of_triplets = triplets
