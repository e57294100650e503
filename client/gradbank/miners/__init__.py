"""Miners: which pairs and triplets are worth their gradient."""

from gradbank.miners.angular import AngularMiner
from gradbank.miners.base import BaseMiner, Miner
from gradbank.miners.every import get_all_pairs_indices, get_all_triplets_indices
from gradbank.miners.hard import BatchEasyHardMiner, BatchHardMiner
from gradbank.miners.hdc import HDCMiner
from gradbank.miners.pairs import MultiSimilarityMiner, PairMarginMiner, PairMiner
from gradbank.miners.sampled import DistanceWeightedMiner, UniformHistogramMiner
from gradbank.miners.triplets import EmbeddingsAlreadyPackagedAsTriplets, TripletMarginMiner

__all__ = [
    "AngularMiner",
    "BaseMiner",
    "BatchEasyHardMiner",
    "BatchHardMiner",
    "DistanceWeightedMiner",
    "EmbeddingsAlreadyPackagedAsTriplets",
    "HDCMiner",
    "Miner",
    "MultiSimilarityMiner",
    "PairMarginMiner",
    "PairMiner",
    "TripletMarginMiner",
    "UniformHistogramMiner",
    "get_all_pairs_indices",
    "get_all_triplets_indices",
]
