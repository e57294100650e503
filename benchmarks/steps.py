"""A case made ready to run: its embeddings, its loss and, where there is one, its bank, filled."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from cases import Case
from torch import Tensor, nn

PIECE = 1024  # rows that enter a bank at a time


class Step(NamedTuple):
    """What is measured, and what gets a gradient by it."""

    forward: Callable[[], Any]
    leaves: list[Tensor]
    loss: nn.Module | None = None  # with its bank, if there is one

    def __call__(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None  # as `zero_grad` of an optimizer leaves it
        made = self.forward()
        if isinstance(made, Tensor):  # and not the indices that a miner lists
            made.backward()


def make(case: Case, library: str, device: str = "cpu") -> Step:
    """The step of a case: `library` is "gradbank" or "pytorch_metric_learning"."""
    losses, miners = (importlib.import_module(f"{library}.{name}") for name in ("losses", "miners"))
    kind = getattr(miners if case.section == "miners" else losses, case.component, None)
    if kind is None:
        raise NotImplementedError("has none")
    labels, embeddings = next(_data(case, case.batch, 1, device))
    if case.section == "miners":
        miner = kind(**case.arguments)
        return Step(lambda: miner(embeddings, labels), [])
    loss = kind(**case.arguments)
    _fill(loss)
    loss.to(device)
    leaves = [embeddings.requires_grad_(), *loss.parameters()]
    if case.bank:
        miner = getattr(miners, case.miner)() if case.miner else None
        bank = losses.CrossBatchMemory(loss, case.dimension, memory_size=case.bank, miner=miner)
        if library == "pytorch_metric_learning":  # whose bank goes where it belongs by a step only
            bank.embedding_memory, bank.label_memory = bank.embedding_memory.to(device), bank.label_memory.to(device)
        for row_labels, rows in _data(case, case.bank, 2, device):
            bank.add_to_memory(rows, row_labels, len(rows))
        return Step(lambda: bank(embeddings, labels), leaves, bank)
    if case.component == "ManifoldLoss":  # takes no labels, but the proxy of each embedding
        own = torch.arange(case.batch, device=device) % loss.K
        return Step(lambda: loss(embeddings, indices_tuple=own), leaves)
    if case.component == "VICRegLoss":  # takes another view
        view = next(_data(case, case.batch, 2, device))[1]
        return Step(lambda: loss(embeddings, ref_emb=view), leaves)
    if case.miner:
        chooses = getattr(miners, case.miner)()
        return Step(lambda: loss(embeddings, labels, chooses(embeddings, labels)), leaves)
    return Step(lambda: loss(embeddings, labels), leaves, loss)


def batches(case: Case, number: int, device: str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """Labels and embeddings of so many different batches, for a case with a bank."""
    for seed in range(number):
        labels, embeddings = next(_data(case, case.batch, 3 + seed, device))
        yield labels, embeddings.requires_grad_()


def smaller(case: Case) -> Case:
    """The same step on little, which leaves in a process what any other leaves too."""
    arguments = dict(case.arguments)
    if case.section == "classes":
        arguments["num_classes"] = min(1000, arguments["num_classes"])
    few = {
        "batch": min(case.batch, 128),
        "bank": min(case.bank, 1024),
        "labels": case.labels and min(case.labels, 1000),
    }
    return replace(case, **few, arguments=arguments)


def _data(case: Case, number: int, seed: int, device: str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """Labels and embeddings, a piece at a time for a bank: cosine about 0.2 within a class, about 0 across classes; or,
    collapsed, about 0.99 throughout."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1000, case.dimension, generator=torch.Generator().manual_seed(0))
    for start in range(0, number, PIECE if case.bank else number):
        size = min(PIECE, number - start) if case.bank else number
        if case.labels is None:
            labels = torch.arange(start, start + size) // 4
        else:
            labels = torch.randint(case.labels, (size,), generator=generator)
        noise = torch.randn(size, case.dimension, generator=generator)
        rows = centres[:1] + 0.1 * noise if case.collapsed else 0.5 * centres[labels % len(centres)] + noise
        yield labels.to(device), rows.to(device)


def _fill(loss: nn.Module) -> None:
    """The same weights for both libraries."""
    with torch.no_grad():
        for number, (_, weights) in enumerate(sorted(loss.named_parameters())):
            weights.normal_(generator=torch.Generator().manual_seed(number))
