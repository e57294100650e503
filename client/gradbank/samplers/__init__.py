"""Samplers: which items a `DataLoader` puts into a batch."""

from gradbank.samplers.classes import MPerClassSampler
from gradbank.samplers.hierarchy import HierarchicalSampler
from gradbank.samplers.random import SamplingError
from gradbank.samplers.triplets import FixedSetOfTriplets
from gradbank.samplers.weights import TuplesToWeightsSampler

__all__ = [
    "FixedSetOfTriplets",
    "HierarchicalSampler",
    "MPerClassSampler",
    "SamplingError",
    "TuplesToWeightsSampler",
]
