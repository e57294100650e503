"""The demo's picture: how the loss fell, how recall rose, and what the network finds."""

from pathlib import Path
from typing import Any

import torch

from gradbank.datasets import Glyphs, augment
from gradbank_server.demo.recipe import Encoder
from gradbank_server.demo.training import Course

_INK, _SOFT, _GOOD, _BAD = "#1f4e79", "#9bb7d4", "#2e8b57", "#c0392b"
_QUERIES, _NEIGHBOURS = 8, 6


def draw(file: Path, encoder: Encoder, course: Course, unseen: Glyphs) -> None:
    """Saves the picture as `file`; a neighbour's frame is green if it is of the query's class, red if not."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(12, 6.4), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=[1, 1.05])
    left, right = halves
    upper, lower = left.subplots(2, 1)
    _curve(upper, course)
    steps, recalls = zip(*course.recalls)
    lower.plot(steps, [100 * r for r in recalls], "o-", color=_INK)
    lower.set(title="R@1 on classes never trained on", xlabel="step", ylabel="%", ylim=(0, 100))
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    right.suptitle("unseen queries (left) and their nearest neighbours", fontsize=11)
    _grid(right.subplots(_QUERIES, _NEIGHBOURS + 1), encoder, unseen)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _curve(axis: Any, course: Course) -> None:
    losses = torch.tensor(course.losses)
    width = max(len(losses) // 50, 1)
    smooth = losses.unfold(0, width, 1).mean(1)
    axis.plot(losses.tolist(), color=_SOFT, linewidth=0.6)
    axis.plot(range(width - 1, len(losses)), smooth.tolist(), color=_INK, linewidth=1.8)
    axis.set(title="loss: contrastive in the batch + contrastive with the bank", xlabel="step")


def _grid(axes: Any, encoder: Encoder, unseen: Glyphs) -> None:
    pictures = augment(unseen.images, torch.Generator().manual_seed(2))
    embeddings = encoder.embed(pictures)
    queries = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(7))[:_QUERIES]
    similarity = embeddings[queries] @ embeddings.T
    similarity[torch.arange(_QUERIES), queries] = -torch.inf
    nearest = similarity.topk(_NEIGHBOURS, dim=1).indices
    for row, query in enumerate(queries.tolist()):
        shown = [query, *nearest[row].tolist()]
        for axis, index in zip(axes[row], shown):
            axis.imshow(pictures[index, 0].numpy(), cmap="gray_r")
            axis.set(xticks=[], yticks=[])
            same = bool(unseen.labels[index] == unseen.labels[query])
            colour = "black" if index == query else _GOOD if same else _BAD
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=2)
