"""What is measured, and what each is meant to take: a case for every row of the tables in docs/benchmarks.md."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from floors import Floor


@dataclass(frozen=True)
class Sizes:
    """How large the cases are.

    Attributes:
        batch: B, where the batch is compared with a bank or with class weights.
        bank, large: M of the two banks.
        labels: how many classes there are in a bank.
        itself, some, few: B, where the batch is compared with itself, four rows of each class.
        classes: C, the class weights.
    """

    batch: int = 256
    bank: int = 65_536
    large: int = 1_048_576
    labels: int = 1000
    itself: int = 2048
    some: int = 256
    few: int = 64
    classes: int = 100_000


SMALL = Sizes(batch=32, bank=1024, large=4096, labels=20, itself=64, some=24, few=16, classes=2000)


@dataclass(frozen=True)
class Target:
    """What a case may take; None is not said, beyond that it completes."""

    ratio: float | None = None  # of the time of what is measured beside it
    seconds: float | None = None
    mib: float | None = None


@dataclass(frozen=True)
class Case:
    """A step to measure: a loss and its gradient, or a miner.

    Attributes:
        section: what is compared with what; see `SECTIONS`.
        name: its row's title, a part of which is the name of the loss or miner.
        component: the loss, or the miner in the section of miners.
        arguments: what it is built with.
        bank: M; 0 without a bank.
        labels: how many classes the batch's rows are of; None is four rows of each.
        collapsed: whether all embeddings lie around one point, rather than around those of their classes.
        beside: what its time is a multiple of: a floor, or the same on fewer rows; None is the clock.
    """

    section: str
    name: str
    component: str
    target: Target
    batch: int
    dimension: int = 128
    bank: int = 0
    labels: int | None = None
    miner: str | None = None
    collapsed: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    beside: "Floor | Case | None" = None


ALIKE = (  # losses whose targets against a bank are alike
    "NTXentLoss",
    "TupletMarginLoss",
    "SupConLoss",
    "MultiSimilarityLoss",
    "GeneralizedLiftedStructureLoss",
    "NCALoss",
    "SignalToNoiseRatioContrastiveLoss",
    "IntraPairVarianceLoss",
    "MarginLoss",
    "LiftedStructureLoss",
)
OF_PAIRS = (*ALIKE, "CircleLoss", "ContrastiveLoss", "ThresholdConsistentMarginLoss")
IN_BATCH_ONLY = ("FastAPLoss", "RankedListLoss", "InstanceLoss")
ONE_PAIR_A_CLASS = ("NPairsLoss", "NPairLoss")
OF_TRIPLETS = ("TripletMarginLoss", "DynamicSoftMarginLoss")
BY_THE_CLOCK = ("SmoothAPLoss", "PNPLoss", "HistogramLoss")
MANY_CLASSES = ("ArcFaceLoss", "CosFaceLoss", "NormalizedSoftmaxLoss", "ProxyAnchorLoss", "SubCenterArcFaceLoss")
FEW_CLASSES = ("ProxyNCALoss", "SoftTripleLoss", "SphereFaceLoss", "LargeMarginSoftmaxLoss", "P2SGradLoss")
CENTERS = {"SubCenterArcFaceLoss": 3, "SoftTripleLoss": 10}  # of each class
ARGUMENTS = {"RankedListLoss": {"margin": 0.4, "Tn": 5}}
MINERS = (
    "MultiSimilarityMiner",
    "TripletMarginMiner",
    "BatchHardMiner",
    "BatchEasyHardMiner",
    "PairMarginMiner",
    "HDCMiner",
    "AngularMiner",
    "DistanceWeightedMiner",
    "UniformHistogramMiner",
)


LISTED = (  # losses that are given what a miner lists
    ("TripletMarginLoss", "TripletMarginMiner"),
    ("MultiSimilarityLoss", "MultiSimilarityMiner"),
    ("ContrastiveLoss", "PairMarginMiner"),
)


def bank(sizes: Sizes) -> Iterator[Case]:
    floor = Floor(sizes.batch, sizes.bank, 128)

    def case(name: str, loss: str, ratio: float, mib: float | None = None, **more: Any) -> Case:
        more = {"bank": sizes.bank, "labels": sizes.labels, "beside": floor, **more}
        return Case("bank", name, loss, Target(ratio, mib=mib), sizes.batch, **more)

    yield from (case(loss, loss, 2, 100) for loss in ALIKE)
    yield case("CircleLoss", "CircleLoss", 3)
    yield case("ContrastiveLoss, few active negatives", "ContrastiveLoss", 1.3)
    yield case("ContrastiveLoss, collapsed embeddings", "ContrastiveLoss", 2.5, collapsed=True)
    yield case("TripletMarginLoss, all triplets", "TripletMarginLoss", 5, 100)
    yield case("TripletMarginLoss, TripletMarginMiner", "TripletMarginLoss", 5, 100, miner="TripletMarginMiner")
    yield case("ContrastiveLoss, MultiSimilarityMiner", "ContrastiveLoss", 3, miner="MultiSimilarityMiner")
    pairs = Floor(sizes.batch * sizes.bank // sizes.labels, sizes.bank, 128)  # a row for each positive pair
    yield case("AngularLoss", "AngularLoss", 2, 200, beside=pairs)


def batch(sizes: Sizes) -> Iterator[Case]:
    size = sizes.itself
    floor = Floor(size, size, 128, both=True)

    def case(loss: str, target: Target, beside: Floor | None = None, arguments: dict[str, Any] | None = None) -> Case:
        return Case("batch", loss, loss, target, size, beside=beside, arguments=arguments or ARGUMENTS.get(loss, {}))

    yield from (case(loss, Target(3), floor) for loss in OF_PAIRS + IN_BATCH_ONLY)
    yield case("AngularLoss", Target(3), Floor(3 * size, size, 128, both=True))  # three positives of each
    yield from (case(loss, Target(3), Floor(size // 4, size // 4, 128, both=True)) for loss in ONE_PAIR_A_CLASS)
    yield from (case(loss, Target(6), floor) for loss in OF_TRIPLETS)
    yield from (case(loss, Target(seconds=1)) for loss in BY_THE_CLOCK)
    for loss in MANY_CLASSES + FEW_CLASSES:
        weights = Floor(size, CENTERS.get(loss, 1) * 1000, 128, both=True)
        yield case(loss, Target(), weights, of_classes(loss, 1000, 128))
    yield case("ManifoldLoss", Target(), arguments={"l": 128})
    yield case("VICRegLoss", Target())


def middle(sizes: Sizes) -> Iterator[Case]:
    yield from _of_size(sizes.some, "middle")


def small(sizes: Sizes) -> Iterator[Case]:
    yield from _of_size(sizes.few, "small")


def _of_size(batch: int, section: str) -> Iterator[Case]:
    for loss in (*OF_PAIRS, "TripletMarginLoss", "AngularLoss", *ONE_PAIR_A_CLASS, *IN_BATCH_ONLY, *BY_THE_CLOCK):
        yield Case(section, loss, loss, Target(), batch, arguments=ARGUMENTS.get(loss, {}))
    for loss, miner in LISTED:
        yield Case(section, f"{loss}, {miner}'s list", loss, Target(), batch, miner=miner)


def classes(sizes: Sizes) -> Iterator[Case]:
    for loss in MANY_CLASSES:
        floor = Floor(sizes.batch, CENTERS.get(loss, 1) * sizes.classes, 512, both=True)
        arguments, target = of_classes(loss, sizes.classes, 512), Target(2, mib=400)
        sized = {"dimension": 512, "labels": sizes.classes, "arguments": arguments}
        yield Case("classes", loss, loss, target, sizes.batch, beside=floor, **sized)


def of_classes(loss: str, number: int, dimension: int) -> dict[str, Any]:
    """The arguments of a loss of class weights."""
    return {"num_classes": number, "descriptors_dim" if loss == "P2SGradLoss" else "embedding_size": dimension}


def miners(sizes: Sizes) -> Iterator[Case]:
    yield from (Case("miners", each, each, Target(seconds=1, mib=300), sizes.itself) for each in MINERS)


def large(sizes: Sizes) -> Iterator[Case]:
    of_pairs_and_triplets = [(loss, 1) for loss in (*OF_PAIRS, "TripletMarginLoss")]
    # as many positives of each anchor: the work of AngularLoss is positive pairs times rows
    alike = [(loss, sizes.large // sizes.bank) for loss in ("TripletMarginLoss", "AngularLoss")]
    for loss, more in of_pairs_and_triplets + alike:
        name = f"{loss}, {sizes.labels * more:,} classes" if more > 1 else loss
        fewer = Case("large", name, loss, Target(), sizes.batch, bank=sizes.bank, labels=sizes.labels)
        sized = {"bank": sizes.large, "labels": sizes.labels * more}
        yield Case("large", name, loss, Target(1.05, mib=256), sizes.batch, beside=fewer, **sized)


SECTIONS = {
    "bank": bank,
    "batch": batch,
    "classes": classes,
    "miners": miners,
    "large": large,
    "middle": middle,
    "small": small,
}


def title(section: str, sizes: Sizes) -> str:
    """A section in words."""
    return {
        "bank": f"A bank of {sizes.bank:,} x 128, a batch of {sizes.batch}, {sizes.labels:,} classes",
        "batch": f"A batch of {sizes.itself} x 128 against itself, 4 of each class",
        "middle": f"A batch of {sizes.some} x 128 against itself, 4 of each class",
        "small": f"A batch of {sizes.few} x 128 against itself, 4 of each class",
        "classes": f"{sizes.classes:,} classes x 512, a batch of {sizes.batch}",
        "miners": f"Miners, a batch of {sizes.itself} x 128, 4 of each class",
        "large": f"A bank of {sizes.large:,} x 128, a batch of {sizes.batch}, {sizes.labels:,} classes",
    }[section]
