"""Reducers: from what each pair, triplet or anchor costs to one number.

Every reducer here first says which losses count (those between its `bounds`) and then makes one number of their sums
and counts per anchor. So an engine can add losses up, anchor by anchor, without ever listing them; a reducer of your
own that wants the list, written as in pytorch-metric-learning, gets it.
"""

from gradbank.reducers.base import Reducer, Tally, write
from gradbank.reducers.kept import Bounds, Kept, Kind, LossDict, Ratio, add_up, counted
from gradbank.reducers.means import AvgNonZeroReducer, BoundedReducer, MeanReducer, SumReducer, ThresholdReducer
from gradbank.reducers.nested import DoNothingReducer, MultipleReducers, PerAnchorReducer
from gradbank.reducers.weights import ClassWeightedReducer, DivisorReducer

BaseReducer = Reducer

__all__ = [
    "AvgNonZeroReducer",
    "BaseReducer",
    "BoundedReducer",
    "Bounds",
    "ClassWeightedReducer",
    "DivisorReducer",
    "DoNothingReducer",
    "Kept",
    "Kind",
    "LossDict",
    "MeanReducer",
    "MultipleReducers",
    "PerAnchorReducer",
    "Ratio",
    "Reducer",
    "SumReducer",
    "Tally",
    "ThresholdReducer",
    "add_up",
    "counted",
    "write",
]
