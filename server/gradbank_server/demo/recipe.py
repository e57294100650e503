"""What the demo trains and how: the tuned numbers, the encoder, the batches, the measure. No loss, no loop.

The loss of a step has two terms, as in Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020:

    contrastive(batch) + contrastive(batch, bank)

With the first term the bank serves from the first step. On its own the bank gains less and needs a warm-up of
about 100 steps: its gradients reach one side of a pair only, and the encoder drifts faster from what it remembers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradbank.datasets import Glyphs, augment

__all__ = ["Encoder", "Recipe", "batches", "recall_at_1"]


@dataclass(frozen=True)
class Recipe:
    """The numbers of the training, tuned on `glyphs().split(seed=0)` with three seeds.

    Recall at 1 on the unseen classes: 12 to 14 % untrained, 69 to 70 % trained without the bank, 72 to 75 % with
    it. The loss is `ContrastiveLoss(pos_margin, neg_margin, distance=CosineSimilarity())`: pairs of one
    class are pulled together without end, others are pushed apart only while their cosine is above 0.5.
    """

    classes_per_batch: int = 32
    images_per_class: int = 2
    steps: int = 2000
    learning_rate: float = 6e-3  # at the peak of one cycle
    embedding_size: int = 64
    memory_size: int = 4096  # 64 steps of batches, a third of the training images
    pos_margin: float = 1.0
    neg_margin: float = 0.5
    seed: int = 0

    @property
    def batch_size(self) -> int:
        return self.classes_per_batch * self.images_per_class

    def optimizer(self, encoder: nn.Module) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.OneCycleLR]:
        """Adam and its schedule; both take one step for every batch.

        The cycle allows a rate that is too high to end with (held constant, it ends 3 points lower), and
        towards its slow end the encoder hardly moves, so that what the bank remembers is still true.
        """
        adam = torch.optim.Adam(encoder.parameters(), self.learning_rate)
        cycle = torch.optim.lr_scheduler.OneCycleLR(adam, self.learning_rate, self.steps, pct_start=0.1)
        return adam, cycle


class Encoder(nn.Module):
    """Three convolutions and a linear layer: (B, 1, 28, 28) float -> (B, embedding_size) unit vectors."""

    def __init__(self, embedding_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_stage(1, 24),
            *_stage(24, 48),
            *_stage(48, 96),
            nn.Flatten(),
            nn.Linear(96 * 4 * 4, embedding_size),
        )

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.layers(images), dim=1)

    @torch.no_grad()
    def embed(self, images: Tensor, block: int = 512) -> Tensor:
        """The embeddings of a whole set, (N, 1, 28, 28) -> (N, embedding_size), in evaluation mode."""
        was_training = self.training
        self.eval()
        embeddings = torch.cat([self(images[at : at + block]) for at in range(0, len(images), block)])
        self.train(was_training)
        return embeddings


def _stage(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    # The stride halves the side: 28, 14, 7, 4. The norm has a bias of its own.
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=2, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU()


def batches(
    data: Glyphs, classes_per_batch: int, images_per_class: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of `classes_per_batch` classes with `images_per_class` different images of each.

    Yields augmented images, (B, 1, 28, 28) float, and their labels, (B,) int64, B being the product of the
    two counts. Both draws are without replacement within a batch, and equal generators give equal batches.
    """
    classes = len(data.characters)
    images_of = data.images.view(classes, -1, *data.images.shape[1:])  # images of a class are neighbours
    available = images_of.shape[1]
    if classes_per_batch > classes or images_per_class > available:
        raise ValueError(f"{classes_per_batch} classes x {images_per_class} images asked of {classes} x {available}")
    while True:
        chosen = torch.randperm(classes, generator=generator)[:classes_per_batch]
        # The order of random numbers is a random order: one draw shuffles the images of every class.
        shuffled = torch.rand(classes_per_batch, available, generator=generator).argsort(dim=1)
        images = images_of[chosen[:, None], shuffled[:, :images_per_class]].flatten(0, 1)
        yield augment(images, generator), chosen.repeat_interleave(images_per_class)


def recall_at_1(embeddings: Tensor, labels: Tensor, block: int = 1024) -> float:
    """The share of rows whose nearest other row by cosine, in (N, D) embeddings, has the same of (N,) labels.

    A row that is the only one of its class counts as a miss. Memory is O(block * N), not O(N * N).
    """
    rows = F.normalize(embeddings, dim=1)
    hits = 0
    for start in range(0, len(rows), block):
        queries = rows[start : start + block]
        similarity = queries @ rows.T
        similarity.diagonal(offset=start).fill_(-torch.inf)  # a row is not its own neighbour
        hits += int((labels[similarity.argmax(dim=1)] == labels[start : start + block]).sum())
    return hits / len(rows)
