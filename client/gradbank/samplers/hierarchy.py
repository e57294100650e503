"""Batches of a few groups of classes."""

import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Sampler

from gradbank.samplers.random import Indices, Labels, Random, SamplingError, as_array, choose, groups, source


class HierarchicalSampler(Sampler[list[int]]):
    """Yields batches that hold items of `super_classes_per_batch` super classes, in equal parts.

    A part is filled with `samples_per_class` items of one class after the other, in random order; it stays short
    if its super class has too few classes. Give it to a loader as `batch_sampler`.

    Args:
        labels: `(N, L)`: for each item its class, its super class, and what else there is.
        batch_size: a multiple of `super_classes_per_batch`.
        samples_per_class: divides the part of a super class; "all" takes whole classes, those that still fit.
        batches_per_super_tuple: batches of an epoch from each combination of super classes.
        super_classes_per_batch: super classes in a batch.
        inner_label: the column of the class, and outer_label: that of the super class.
        generator: where to draw from; numpy's global generator by default.

    Raises:
        SamplingError: also a ValueError and an AssertionError: sizes that do not fit each other.

    The method is that of the code released with Cakir et al., "Deep Metric Learning to Rank", CVPR 2019.
    """

    def __init__(
        self,
        labels: Labels,
        batch_size: int,
        samples_per_class: int | Literal["all"],
        batches_per_super_tuple: int = 4,
        super_classes_per_batch: int = 2,
        inner_label: int = 0,
        outer_label: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        known = as_array(labels)
        if known.ndim != 2 or len(known) == 0:
            raise SamplingError(f"labels must be (items, levels), one item or more, got shape {known.shape}")
        if batch_size < 1 or super_classes_per_batch < 1 or batch_size % super_classes_per_batch:
            raise SamplingError(
                f"batch_size must be a multiple of super_classes_per_batch={super_classes_per_batch}, got {batch_size}"
            )
        self.sub_batch_len = batch_size // super_classes_per_batch
        if samples_per_class != "all" and (samples_per_class < 1 or self.sub_batch_len % samples_per_class):
            raise SamplingError(
                f"samples_per_class must divide the {self.sub_batch_len} items of a super class, or be 'all'; "
                f"got {samples_per_class}"
            )
        self.batch_size = batch_size
        self.samples_per_class = samples_per_class
        self.batches_per_super_tuple = batches_per_super_tuple
        self.super_classes_per_batch = super_classes_per_batch
        self.generator = generator
        by_super_class = groups(known[:, outer_label])
        self.super_image_lists: dict[Any, dict[Any, Indices]] = {
            name: {each: rows[within] for each, within in groups(known[rows, inner_label]).items()}
            for name, rows in sorted(by_super_class.items())
        }
        self.super_pairs = list(itertools.combinations(self.super_image_lists, super_classes_per_batch))
        if not self.super_pairs:
            raise SamplingError(
                f"there are {len(by_super_class)} super classes, too few for super_classes_per_batch="
                f"{super_classes_per_batch}"
            )
        self.reshuffle()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        self.reshuffle()
        yield from self.batches

    def reshuffle(self) -> None:
        """Draws the batches of an epoch."""
        random = source(self.generator)
        self.batches: list[list[int]] = []
        for names in self.super_pairs:
            for _ in range(self.batches_per_super_tuple):
                batch = np.concatenate([self._part(random, self.super_image_lists[name]) for name in names]).tolist()
                random.shuffle(batch)
                self.batches.append(batch)
        random.shuffle(self.batches)

    def _part(self, random: Random, classes: dict[Any, Indices]) -> Indices:
        """Items of one super class."""
        order = list(classes)
        random.shuffle(order)
        part: list[Indices] = [np.zeros(0, dtype=np.int64)]
        room = self.sub_batch_len
        for name in order:
            if room == 0:
                break
            size = len(classes[name]) if self.samples_per_class == "all" else self.samples_per_class
            if size <= room:
                part.append(choose(random, classes[name], size))
                room -= size
        return np.concatenate(part)
