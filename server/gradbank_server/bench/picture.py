"""The picture of `gradbank bench`: what a step is made of, and how much it varies."""

import statistics
from pathlib import Path
from typing import Any

from gradbank.errors import InvalidRequest
from gradbank_server.bench.course import PHASES, Course

_COLOURS = dict(zip(PHASES, ("#c9b458", "#c0392b", "#e08e45", "#7fb3d5", "#2e8b57", "#8e6bbf", "#a89032")))
_FORMATS = (".png", ".svg", ".pdf")
_INK, _SOFT = "#1f4e79", "#9bb7d4"


def check_drawable(file: Path) -> None:
    """Raises InvalidRequest if no picture can be saved as that file."""
    try:
        import matplotlib  # noqa: F401  # only whether it is there
    except ImportError:
        raise InvalidRequest("a picture needs matplotlib: pip install 'gradbank[demo]'") from None
    if file.suffix not in _FORMATS:
        raise InvalidRequest(f"--picture must end in {', '.join(_FORMATS)}, got {str(file)!r}")
    if not file.parent.is_dir():
        raise InvalidRequest(f"--picture cannot be saved: there is no folder {str(file.parent)!r}")


def draw(file: Path, course: Course, title: str) -> None:
    """Saves the picture as `file`, in the format that its name ends with."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=[1.35, 1])
    parts: Any = axes
    figure.suptitle(title, fontsize=11)
    _phases(parts[0], course)
    _steps(parts[1], course)
    for axis in parts:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _phases(axis: Any, course: Course) -> None:
    """The medians of the phases end to end, over what there is to compare a step with."""
    start = 0.0
    for phase in PHASES:
        length = 1e3 * statistics.median(course.phases[phase])
        label = f"{phase}: {length:.2f} ms"
        axis.barh(2, length, left=start, color=_COLOURS[phase], label=label, edgecolor="white", linewidth=0.5)
        start += length
    for row, (times, colour) in enumerate(((course.here, _INK), (course.empty, _SOFT))):
        length = 1e3 * statistics.median(times)
        axis.barh(1 - row, length, color=colour)
        axis.annotate(f" {length:.2f} ms", (length, 1 - row), va="center", fontsize=9)
    axis.annotate(f" {1e3 * course.step_s:.2f} ms", (start, 2), va="center", fontsize=9)
    axis.set(
        title="a step, median by phase", xlabel="ms", yticks=[2, 1, 0], xlim=(0, 1.14 * max(start, axis.get_xlim()[1]))
    )
    axis.set_yticklabels(["a step", "the same loss\nin this process", "an empty call"])
    axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=3, fontsize=8, frameon=False)


def _steps(axis: Any, course: Course) -> None:
    """Every step in the order in which they were taken."""
    times = [1e3 * each for each in course.steps]
    axis.plot(times, ".", color=_SOFT, markersize=4)
    for name, value in (("p50", statistics.median(times)), ("p99", sorted(times)[len(times) * 99 // 100])):
        axis.axhline(
            value, color=_INK, linewidth=1, linestyle="-" if name == "p50" else "--", label=f"{name} {value:.2f} ms"
        )
    axis.set(title="every step", xlabel="step", ylabel="ms", ylim=(0, None))
    axis.legend(fontsize=8, frameon=False, loc="lower right")
