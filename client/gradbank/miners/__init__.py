"""Miners: which pairs are worth their gradient."""

from gradbank.miners.base import Miner
from gradbank.miners.similarity import MultiSimilarityMiner

__all__ = ["Miner", "MultiSimilarityMiner"]
