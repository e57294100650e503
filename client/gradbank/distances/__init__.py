"""Distances and similarities between embeddings: `(B, D)` and `(M, D)` give `(B, M)`."""

from gradbank.distances.base import Distance
from gradbank.distances.batched import BatchedDistance
from gradbank.distances.euclidean import LpDistance
from gradbank.distances.noise import SNRDistance
from gradbank.distances.similarity import CosineSimilarity, DotProductSimilarity

BaseDistance = Distance

__all__ = [
    "BaseDistance",
    "BatchedDistance",
    "CosineSimilarity",
    "Distance",
    "DotProductSimilarity",
    "LpDistance",
    "SNRDistance",
]
