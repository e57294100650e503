"""How good embeddings are: nearest neighbours, retrieval and clustering scores, and models that look things up."""

from gradbank.evaluation.accuracy import AccuracyCalculator
from gradbank.evaluation.clusters import KMeans
from gradbank.evaluation.faiss import FaissKMeans, FaissKNN
from gradbank.evaluation.inference import InferenceModel
from gradbank.evaluation.labels import EQUALITY, get_label_match_counts, get_lone_query_labels
from gradbank.evaluation.matches import MatchFinder
from gradbank.evaluation.neighbors import KNN, CustomKNN, ExactKNN
from gradbank.evaluation.own import (
    get_unique_labels,
    maybe_get_avg_of_avgs,
    mean_average_precision,
    mean_reciprocal_rank,
    nan_accuracy,
    precision_at_k,
    r_precision,
    try_getting_not_lone_labels,
)

__all__ = [
    "EQUALITY",
    "KNN",
    "AccuracyCalculator",
    "CustomKNN",
    "ExactKNN",
    "FaissKMeans",
    "FaissKNN",
    "InferenceModel",
    "KMeans",
    "MatchFinder",
    "get_label_match_counts",
    "get_lone_query_labels",
    "get_unique_labels",
    "maybe_get_avg_of_avgs",
    "mean_average_precision",
    "mean_reciprocal_rank",
    "nan_accuracy",
    "precision_at_k",
    "r_precision",
    "try_getting_not_lone_labels",
]
