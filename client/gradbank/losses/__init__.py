"""Every loss, by name."""

from gradbank.losses.angular import AngularLoss
from gradbank.losses.base import BaseMetricLossFunction
from gradbank.losses.centers import SoftTripleLoss, SubCenterArcFaceLoss
from gradbank.losses.classification import ArcFaceLoss, CosFaceLoss, NormalizedSoftmaxLoss
from gradbank.losses.contrastive import (
    ContrastiveLoss,
    IntraPairVarianceLoss,
    SignalToNoiseRatioContrastiveLoss,
    ThresholdConsistentMarginLoss,
)
from gradbank.losses.generic import EmbeddingRegularizerMixin, GenericPairLoss, WeightRegularizerMixin
from gradbank.losses.histogram import HistogramLoss
from gradbank.losses.instance import InstanceLoss, NPairsLoss
from gradbank.losses.loss import Loss, Staged
from gradbank.losses.manifold import ManifoldLoss
from gradbank.losses.n_pair import NPairLoss
from gradbank.losses.norms import LargeMarginSoftmaxLoss, SphereFaceLoss
from gradbank.losses.p2sgrad import P2SGradLoss
from gradbank.losses.pair import PairLoss
from gradbank.losses.proxy import ProxyAnchorLoss, ProxyNCALoss
from gradbank.losses.ranking import FastAPLoss, PNPLoss, RankedListLoss, SmoothAPLoss
from gradbank.losses.similarity import (
    CircleLoss,
    GeneralizedLiftedStructureLoss,
    LiftedStructureLoss,
    MultiSimilarityLoss,
)
from gradbank.losses.soft_margin import DynamicSoftMarginLoss
from gradbank.losses.softmax import NCALoss, NTXentLoss, SupConLoss, TupletMarginLoss
from gradbank.losses.triplet import MarginLoss, TripletMarginLoss
from gradbank.losses.vicreg import VICRegLoss
from gradbank.wrappers import (
    BaseLossWrapper,
    CrossBatchMemory,
    MultipleLosses,
    SelfSupervisedLoss,
    SelfSupervisedLossWrapper,
)

__all__ = [
    "AngularLoss",
    "ArcFaceLoss",
    "BaseLossWrapper",
    "BaseMetricLossFunction",
    "CircleLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "CrossBatchMemory",
    "DynamicSoftMarginLoss",
    "EmbeddingRegularizerMixin",
    "FastAPLoss",
    "GeneralizedLiftedStructureLoss",
    "GenericPairLoss",
    "HistogramLoss",
    "InstanceLoss",
    "IntraPairVarianceLoss",
    "LargeMarginSoftmaxLoss",
    "LiftedStructureLoss",
    "Loss",
    "ManifoldLoss",
    "MarginLoss",
    "MultiSimilarityLoss",
    "MultipleLosses",
    "NCALoss",
    "NPairLoss",
    "NPairsLoss",
    "NTXentLoss",
    "NormalizedSoftmaxLoss",
    "P2SGradLoss",
    "PNPLoss",
    "PairLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "RankedListLoss",
    "SelfSupervisedLoss",
    "SelfSupervisedLossWrapper",
    "SignalToNoiseRatioContrastiveLoss",
    "SmoothAPLoss",
    "SoftTripleLoss",
    "SphereFaceLoss",
    "Staged",
    "SubCenterArcFaceLoss",
    "SupConLoss",
    "ThresholdConsistentMarginLoss",
    "TripletMarginLoss",
    "TupletMarginLoss",
    "VICRegLoss",
    "WeightRegularizerMixin",
]
