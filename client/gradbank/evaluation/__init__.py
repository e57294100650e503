"""How good embeddings are: nearest neighbours, retrieval and clustering scores, and models that look things up."""

from gradbank.evaluation.accuracy import AccuracyCalculator
from gradbank.evaluation.clusters import KMeans
from gradbank.evaluation.faiss import FaissKMeans, FaissKNN
from gradbank.evaluation.inference import InferenceModel
from gradbank.evaluation.labels import EQUALITY, get_label_match_counts, get_lone_query_labels
from gradbank.evaluation.matches import MatchFinder
from gradbank.evaluation.metrics import precision_at_k
from gradbank.evaluation.neighbors import KNN, CustomKNN, ExactKNN

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
    "precision_at_k",
]
