"""Batches with the same number of items of each class."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from gradbank.samplers.random import Labels, SamplingError, choose, groups, source


class MPerClassSampler(Sampler[int]):
    """Yields `m` items of a class, then `m` of the next: every batch has `m` of each class in it.

    A class with fewer than `m` items repeats some of them.

    Args:
        labels: `(N,)`, the class of each item.
        m: items of a class, in a row.
        batch_size: a multiple of `m`, and the loader's; then the classes are drawn anew for each batch. None draws
            them for each pass through all classes, so that a batch has m of each only if m divides the loader's.
        length_before_new_iter: items of an epoch at most, rounded down to whole batches or passes; one pass at least.
        generator: where to draw from; numpy's global generator by default.

    `len` is the number of items that an epoch yields. PML's is `length_before_new_iter` where one pass is longer.

    Raises:
        SamplingError: also a ValueError and an AssertionError: sizes that do not fit each other.
    """

    def __init__(
        self,
        labels: Labels,
        m: int,
        batch_size: int | None = None,
        length_before_new_iter: int = 100000,
        generator: torch.Generator | None = None,
    ) -> None:
        self.m_per_class = int(m)
        self.batch_size = None if batch_size is None else int(batch_size)
        self.labels_to_indices = groups(labels)
        self.labels = list(self.labels_to_indices)
        self.generator = generator
        if self.m_per_class < 1:
            raise SamplingError(f"m must be at least 1, got {m}")
        self.length_of_single_pass = self.m_per_class * len(self.labels)
        if self.batch_size is not None:
            self._check(self.batch_size, length_before_new_iter)
        self.list_size = max(length_before_new_iter - length_before_new_iter % self._step, self._step)

    def __len__(self) -> int:
        return self.list_size

    @property
    def _step(self) -> int:
        return self.length_of_single_pass if self.batch_size is None else self.batch_size

    def calculate_num_iters(self) -> int:
        """How often the classes are drawn in an epoch, for an `__iter__` of your own."""
        return self.list_size // self._step

    def __iter__(self) -> Iterator[int]:
        random = source(self.generator)
        drawn = self._step // self.m_per_class
        items: list[int] = []
        while len(items) < self.list_size:
            random.shuffle(self.labels)
            for label in self.labels[:drawn]:
                items += choose(random, self.labels_to_indices[label], self.m_per_class).tolist()
        return iter(items)

    def _check(self, batch_size: int, length: int) -> None:
        if batch_size < 1 or batch_size % self.m_per_class:
            raise SamplingError(f"batch_size must be a multiple of m={self.m_per_class}, got {batch_size}")
        if self.length_of_single_pass < batch_size:
            raise SamplingError(
                f"batch_size must be at most m * classes = {self.m_per_class} * {len(self.labels)}, got {batch_size}"
            )
        if length < batch_size:
            raise SamplingError(f"length_before_new_iter must be at least batch_size={batch_size}, got {length}")
