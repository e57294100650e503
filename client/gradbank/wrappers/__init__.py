"""Losses around other losses: two views of each sample, several losses at once, and a queue of past embeddings."""

from gradbank.memory import CrossBatchMemory
from gradbank.wrappers.base import BaseLossWrapper
from gradbank.wrappers.multiple import MultipleLosses
from gradbank.wrappers.self_supervised import SelfSupervisedLoss, SelfSupervisedLossWrapper

__all__ = [
    "BaseLossWrapper",
    "CrossBatchMemory",
    "MultipleLosses",
    "SelfSupervisedLoss",
    "SelfSupervisedLossWrapper",
]
