"""Every loss, by name."""

from gradbank.losses.base import Loss, PairLoss
from gradbank.losses.classification import ArcFaceLoss
from gradbank.losses.contrastive import ContrastiveLoss
from gradbank.losses.similarity import MultiSimilarityLoss
from gradbank.losses.softmax import NTXentLoss, SupConLoss
from gradbank.losses.triplet import TripletMarginLoss
from gradbank.memory import CrossBatchMemory

__all__ = [
    "ArcFaceLoss",
    "ContrastiveLoss",
    "CrossBatchMemory",
    "Loss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "PairLoss",
    "SupConLoss",
    "TripletMarginLoss",
]
