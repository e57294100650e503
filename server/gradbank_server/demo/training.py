"""The demo's training loop, with a clock on each part of a step and a twin that checks the server."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradbank.datasets import Glyphs, augment
from gradbank.distances import CosineSimilarity
from gradbank.losses import ContrastiveLoss, CrossBatchMemory
from gradbank.remote import Client
from gradbank_server.demo.recipe import Encoder, Recipe, batches, recall_at_1

CHECK_EVERY = 25  # steps between two comparisons with the twin
MEASURES = 5  # how often recall is measured on the way


@dataclass
class Course:
    """What happened in a training.

    Attributes:
        losses: the loss of each step. recalls: `(step, recall at 1 on unseen classes)`.
        model_s, server_s, network_s: seconds of each step.
        difference: the largest difference of a remote gradient from the one computed here; checked: how often.
    """

    losses: list[float] = field(default_factory=list)
    recalls: list[tuple[int, float]] = field(default_factory=list)
    model_s: list[float] = field(default_factory=list)
    server_s: list[float] = field(default_factory=list)
    network_s: list[float] = field(default_factory=list)
    difference: float = 0.0
    checked: int = 0


def train(
    client: Client, seen: Glyphs, unseen: Glyphs, recipe: Recipe, progress: Callable[[Course], None]
) -> tuple[Encoder, Course]:
    """Trains an encoder on the seen classes, its bank loss computed by the server.

    A twin of the hosted loss, in this process, is given every batch; every `CHECK_EVERY` steps it computes the same
    step, and its gradient is compared with the server's.
    """
    torch.manual_seed(recipe.seed)
    encoder = Encoder(recipe.embedding_size)
    adam, schedule = recipe.optimizer(encoder)
    in_batch, twin = _contrastive(recipe), _with_bank(recipe)
    with_bank = client.open("glyphs", _with_bank(recipe))
    course = Course()
    test = augment(unseen.images, torch.Generator().manual_seed(2))  # as unlike each other as in training
    source = batches(seen, recipe.classes_per_batch, recipe.images_per_class, torch.Generator().manual_seed(1))
    for step in range(recipe.steps):
        if step % max(recipe.steps // MEASURES, 1) == 0:
            course.recalls.append((step, recall_at_1(encoder.embed(test), unseen.labels)))
        begun = time.perf_counter()
        images, labels = next(source)
        embeddings = encoder(images)
        asked = time.perf_counter()
        hosted = with_bank(embeddings, labels)
        answered = time.perf_counter()
        loss = in_batch(embeddings, labels) + hosted
        checked = step % CHECK_EVERY == 0
        adam.zero_grad()
        loss.backward(retain_graph=checked)
        adam.step()
        schedule.step()
        ended = time.perf_counter()
        at_server = sum(with_bank.timings[phase] for phase in ("queue", "decode", "compute", "encode"))
        course.losses.append(loss.item())
        course.server_s.append(at_server)
        course.network_s.append(answered - asked - at_server)
        course.model_s.append(ended - begun - (answered - asked))
        if checked:
            course.difference = max(course.difference, _difference(embeddings, hosted, twin, labels))
            course.checked += 1
        else:
            twin.add_to_memory(embeddings, labels)
        progress(course)
    course.recalls.append((recipe.steps, recall_at_1(encoder.embed(test), unseen.labels)))
    return encoder, course


def _contrastive(recipe: Recipe) -> ContrastiveLoss:
    return ContrastiveLoss(recipe.pos_margin, recipe.neg_margin, distance=CosineSimilarity())


def _with_bank(recipe: Recipe) -> CrossBatchMemory:
    return CrossBatchMemory(_contrastive(recipe), recipe.embedding_size, recipe.memory_size)


def _difference(embeddings: Tensor, hosted: Tensor, twin: CrossBatchMemory, labels: Tensor) -> float:
    """The largest difference between the server's gradient of this step and the twin's."""
    leaf = embeddings.detach().requires_grad_()
    (here,) = torch.autograd.grad(twin(leaf, labels), leaf)
    (there,) = torch.autograd.grad(hosted, embeddings)
    return float((here - there).abs().max())
