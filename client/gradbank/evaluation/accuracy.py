"""Retrieval and clustering scores of embeddings."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gradbank.evaluation.clusters import KMeans, numbered, sklearn_metrics
from gradbank.evaluation.faiss import FaissKMeans, FaissKNN, has_faiss
from gradbank.evaluation.labels import EQUALITY, Answers, Comparison, distinct
from gradbank.evaluation.metrics import SCORES, average, calculation, nothing
from gradbank.evaluation.neighbors import KNN, ExactKNN, Found
from gradbank.evaluation.retrieval import Array, KNNFunction, Retrieval
from gradbank.evaluation.selection import PREFIX, Selection

log = logging.getLogger(__name__)


class AccuracyCalculator(Selection):
    """Scores embeddings by their nearest references and by their clusters.

        precision_at_1               the part of the queries whose nearest reference has their label
        r_precision                  how many of the R nearest do, over R: as many references have the query's label
        mean_average_precision_at_r  the precision at each match among the R nearest, summed, over R
        mean_average_precision       the same among all k
        mean_reciprocal_rank         one over the rank of the first match
        NMI, AMI                     the mutual information of labels and clusters: normalised, adjusted for chance

    Queries that no reference matches are left out of the first five; if no query is left, those are NaN.

    A metric of your own is a method `calculate_NAME(self, **kwargs)` of a subclass, given `query`, `reference`,
    `query_labels`, `reference_labels`, `ref_includes_query` and `label_comparison_fn`. If its name is in
    `requires_knn()` it also gets `knn_labels`, `knn_distances`, `label_counts`, `lone_query_labels` and
    `not_lone_query_mask`; if in `requires_clustering()`, `cluster_labels`.

    Neighbours are found and scored some queries at a time, so `k=None` holds no queries x references table as it
    does in PML. Only a metric of your own, or a `knn_func` that is not a `KNN`, gets them all at once.

    Args:
        include: the metrics to compute, all by default, and exclude: those to leave out.
        avg_of_avgs: the mean of each label's mean, rather than that of the queries.
        return_per_class: a list of each label's mean, in the order of the labels.
        k: how many neighbours to find; None is all, "max_bin_count" the largest R.
        label_comparison_fn: which labels match, of two float tensors that broadcast (float64 where float32 would run
            labels together); equality by default.
        device: where to compute; a GPU by default if there is one.
        knn_func: finds neighbours; by default `FaissKNN` where faiss is installed, else `ExactKNN`.
        kmeans_func: `(embeddings, number)` to cluster numbers; by default `FaissKMeans`, else `KMeans`.

    Raises:
        ValueError: a metric that does not exist, another `k`, or both ways of averaging by label.
        TypeError: `include` or `exclude` that is not a tuple or list.
        NotImplementedError: clustering metrics with a comparison other than equality.
    """

    def __init__(
        self,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        avg_of_avgs: bool = False,
        return_per_class: bool = False,
        k: int | Literal["max_bin_count"] | None = None,
        label_comparison_fn: Comparison | None = None,
        device: torch.device | str | None = None,
        knn_func: KNN | KNNFunction | None = None,
        kmeans_func: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        if avg_of_avgs and return_per_class:
            raise ValueError("avg_of_avgs and return_per_class exclude each other")
        if k is not None and k != "max_bin_count" and not (isinstance(k, int) and k > 0):
            raise ValueError(f"k must be an integer above 0, None or 'max_bin_count', got {k!r}")
        super().__init__(include, exclude)
        if label_comparison_fn and self._uses(self.requires_clustering()):
            raise NotImplementedError(
                "clusters are compared by equal labels only: with label_comparison_fn, exclude=('NMI', 'AMI')"
            )
        self.avg_of_avgs = avg_of_avgs
        self.return_per_class = return_per_class
        self.k = k
        self.label_comparison_fn = label_comparison_fn or EQUALITY
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.knn_func = knn_func or (FaissKNN() if has_faiss() else ExactKNN())
        self.kmeans_func = kmeans_func or (
            FaissKMeans(niter=20, gpu=self.device.type == "cuda") if has_faiss() else KMeans(niter=20)
        )

    def get_accuracy(
        self,
        query: Array,
        query_labels: Array,
        reference: Array | None = None,
        reference_labels: Array | None = None,
        ref_includes_query: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The value of each metric, by name.

        Args:
            query: `(Q, D)`, computed with in float32, and query_labels: `(Q,)`, or `(Q, L)` in several parts.
            reference: `(M, D)`, and reference_labels; without them queries are looked for among each other.
            ref_includes_query: the first Q references are the queries, none of which is its own neighbour.
            include: the metrics to compute this time, and exclude: those to leave out.

        Raises:
            ValueError: lengths that differ, NaN or infinity, or first references that are not the queries.
            ImportError: NMI or AMI without scikit-learn.
        """
        self.check_primary_metrics(include, exclude)
        self.curr_function_dict = self.get_function_dict(include, exclude)
        if self._uses(["NMI", "AMI"]):
            sklearn_metrics()  # refuse before anything takes long
        task = Retrieval.of(
            *(query, query_labels, reference, reference_labels, ref_includes_query),
            device=self.device,
            numbered=self.label_comparison_fn is EQUALITY,
        )
        given = {**vars(task), "label_comparison_fn": self.label_comparison_fn}
        values: dict[str, Any] = {}
        if self._uses(self.requires_knn()):
            answers = Answers.of(
                task.query_labels, task.reference_labels, task.ref_includes_query, self.label_comparison_fn
            )
            if not bool((answers.relevant > 0).any()):
                log.warning("None of the query labels are in the reference set.")
            own = int(task.ref_includes_query)
            k = min(self.determine_k(answers.relevant + own, len(task.reference), task.ref_includes_query), task.others)
            if all(self._is_as_here(name) for name in self.curr_function_dict):
                found = task.chunks(self.knn_func, k)
            else:
                distances, indices = task.neighbors(self.knn_func, k)
                given |= self._neighbors(task, answers, distances, indices)
                found = iter([(slice(0, len(indices)), distances, indices)])
            values = self._scores(task, answers, found)
        if self._uses(self.requires_clustering()):
            given["cluster_labels"] = self.get_cluster_labels(**given)
        rest = {name: each for name, each in self.curr_function_dict.items() if name not in values}
        values |= self._get_accuracy(rest, **given)
        ordered = {name: values[name] for name in self.curr_function_dict if name in values}
        return ordered | values  # and what an own _get_accuracy calls otherwise

    def requires_clustering(self) -> list[str]:
        """The metrics that are given `cluster_labels`."""
        return ["NMI", "AMI"]

    def requires_knn(self) -> list[str]:
        """The metrics that are given the nearest neighbours."""
        return list(SCORES)

    def get_cluster_labels(self, query: Tensor, query_labels: Tensor, **kwargs: Any) -> Tensor:
        """`(Q,)` cluster numbers: as many clusters as there are labels."""
        return self.kmeans_func(query, len(distinct(query_labels)[0]))

    def calculate_NMI(self, query_labels: Tensor, cluster_labels: Tensor, **kwargs: Any) -> float:
        """The normalised mutual information of labels and clusters."""
        return float(sklearn_metrics().normalized_mutual_info_score(*map(numbered, (query_labels, cluster_labels))))

    def calculate_AMI(self, query_labels: Tensor, cluster_labels: Tensor, **kwargs: Any) -> float:
        """The mutual information of labels and clusters, adjusted for chance.

        Vinh et al., "Information Theoretic Measures for Clusterings Comparison", JMLR 2010.
        """
        return float(sklearn_metrics().adjusted_mutual_info_score(*map(numbered, (query_labels, cluster_labels))))

    calculate_precision_at_1 = calculation("precision_at_1")
    calculate_r_precision = calculation("r_precision")
    calculate_mean_average_precision = calculation("mean_average_precision")
    calculate_mean_average_precision_at_r = calculation("mean_average_precision_at_r")
    calculate_mean_reciprocal_rank = calculation("mean_reciprocal_rank")

    def determine_k(self, bin_counts: Tensor, num_reference_embeddings: int, ref_includes_query: bool) -> int:
        """How many neighbours to find.

        Args:
            bin_counts: how many references match a query, itself included if it is among them; one or more queries.
        """
        own = int(ref_includes_query)
        largest = int(bin_counts.max()) - own
        if self.k == "max_bin_count":
            return largest
        if self.k is None:
            return num_reference_embeddings - own
        cut = sorted({"r_precision", "mean_average_precision_at_r"} & set(self.curr_function_dict))
        if cut and self.k < largest:
            log.warning(
                f"k={self.k} is less than the {largest} references that match some query, so {' and '.join(cut)} will "
                f"be incorrect: use k='max_bin_count'. MAP@{self.k} is 'mean_average_precision', without _at_r."
            )
        return self.k

    def description(self) -> str:
        """How the metrics are averaged, where it is not by query."""
        return "avg_of_avgs" if self.avg_of_avgs else ""

    def _scores(self, task: Retrieval, answers: Answers, found: Iterator[Found]) -> dict[str, Any]:
        """The metrics of neighbours that are as this class has them: none needs those all at once."""
        names = [name for name in self._uses(SCORES) if self._is_as_here(name)]
        labels = task.query_labels[answers.relevant > 0]
        if not len(labels):
            return dict.fromkeys(names, nothing(len(answers.counts[0]), self.return_per_class))
        scores = task.scores(names, found, answers)
        return {name: average(each, labels, self.avg_of_avgs, self.return_per_class) for name, each in scores.items()}

    def _neighbors(self, task: Retrieval, answers: Answers, distances: Tensor, indices: Tensor) -> dict[str, Any]:
        """All neighbours at once, and what else is given to metrics of one's own."""
        return {
            "knn_labels": task.reference_labels[indices],
            "knn_distances": distances,
            "label_counts": answers.counts,
            "lone_query_labels": answers.lone_labels,
            "not_lone_query_mask": answers.relevant > 0,
        }

    def _is_as_here(self, name: str) -> bool:
        """Whether a metric is as this class has it, and so can be computed some queries at a time; none is for a class
        that computes all of them in its own way."""
        if type(self)._get_accuracy is not AccuracyCalculator._get_accuracy:
            return False
        here = getattr(AccuracyCalculator, PREFIX + name, None)
        return here is not None and getattr(self.curr_function_dict[name], "__func__", None) is here
