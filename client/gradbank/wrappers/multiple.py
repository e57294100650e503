"""Several losses of one batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from numbers import Number
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gradbank.component import Component, component
from gradbank.engine import Indices, full_precision, widened
from gradbank.learned import learned_at_once
from gradbank.losses.loss import Loss, Staged
from gradbank.miners.base import Miner
from gradbank.mismatch import Mismatch
from gradbank.overrides import is_ours, refuse_uncalled


@component
class MultipleLosses(Loss):
    """The weighted sum of several losses of one batch: `sum_k weights[k] * losses[k](embeddings, labels)`.

    A call that fails leaves what any of them remembers as it was.

    Args:
        losses: a list, or a dictionary by name.
        miners: likewise; each chooses the pairs of the loss in the same place. In a list None is no miner, in a
            dictionary a name may be left out.
        weights: likewise; one for each loss, which may be learned (a tensor that requires a gradient, or several). None
            is 1 for all.

    Raises:
        ValueError: no losses, or miners or weights that do not belong to them.
        TypeError: a component of another kind among the losses or miners.
    """

    losses: Sequence[nn.Module] | Mapping[str, nn.Module]
    miners: Sequence[nn.Module | None] | Mapping[str, nn.Module] | None = None
    weights: Sequence[float] | Mapping[str, float] | None = field(default=None, metadata={"weight": True})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if is_ours(cls, "forward") and is_ours(cls, "stage"):
            refuse_uncalled(cls, ("assertions_if_not_none",), "give it miners of your own")

    def __post_init__(self) -> None:
        if isinstance(self.losses, Loss):
            raise TypeError(
                f"losses must be a list or a dictionary, got one {type(self.losses).__name__}: use it by itself"
            )
        if not len(self.losses):
            raise ValueError("MultipleLosses needs at least one loss")
        _check_kind("losses", self.losses, Loss)
        if self.miners:
            self._check("miners", self.miners)
            _check_kind("miners", self.miners, Miner)
        if self.weights is None:
            self.weights = dict.fromkeys(self._keys(), 1.0) if self.is_dict else [1.0] * len(self.losses)
        elif isinstance(self.weights, tuple):  # in which nothing can stand in for what is learned
            self.weights = list(self.weights)
        elif isinstance(self.weights, np.ndarray) or (
            isinstance(self.weights, Tensor) and not _is_learned(self.weights)
        ):
            self.weights = self.weights.tolist()
        self._check("weights", self.weights)
        for each in self.weights.values() if isinstance(self.weights, Mapping) else self.weights:
            if not isinstance(each, Number | Tensor | np.ndarray):
                raise TypeError(f"weights must be numbers, got {each!r}")

    @property
    def is_dict(self) -> bool:
        """Whether the losses have names."""
        return isinstance(self.losses, Mapping | nn.ModuleDict)

    def forward(self, embeddings: Tensor, labels: Tensor | None = None, indices_tuple: Indices | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            embeddings: `(B, D)` floats, and labels: `(B,)`.
            indices_tuple: what each of the losses takes; only if there are no miners.

        Raises:
            ValueError: indices in addition to miners, or whatever one of the losses refuses.
        """
        return self.carried_out(embeddings, labels, indices_tuple)

    def stage(self, embeddings: Tensor, labels: Tensor | None = None, indices_tuple: Indices | None = None) -> Staged:
        if self.miners and indices_tuple is not None:
            raise Mismatch("MultipleLosses was built with miners, which choose the pairs: leave indices_tuple out")
        losses = cast("dict[Any, Loss]", self.losses)
        commits: list[Callable[[], None]] = []

        # the second view of a `SelfSupervisedLoss`, which gets a gradient too
        views = labels if isinstance(labels, Tensor) and labels.is_floating_point() and labels.ndim > 1 else None

        def whole(inputs: tuple[Tensor, ...]) -> Tensor:
            rows, total = inputs[0], torch.zeros((), dtype=inputs[0].dtype, device=inputs[0].device)
            others = labels if views is None else inputs[1]
            weights = cast("dict[Any, float]", self.weights)  # read here, where leaves stand in for what is learned
            for key in self._keys():
                chosen = self.get_indices_tuple(key, rows, others, indices_tuple)
                staged = _staged(losses[key], rows, others, chosen)
                if not isinstance(staged.loss, Tensor):
                    raise Mismatch(f"losses[{key!r}] gives its parts, and MultipleLosses adds numbers: reduce them")
                total = total + staged.loss * weights[key]
                commits.append(staged.commit)
            with full_precision(rows.device):
                value: Tensor = self.regularized(total, rows)
            return value

        # the gradients of half precision are added up, and multiplied by what backward brings, before they are rounded
        rows = widened(embeddings) if embeddings.is_floating_point() else embeddings
        given = (rows,) if views is None else (rows, widened(views))
        if all(is_ours(type(each)) or isinstance(each, nn.ModuleList | nn.ModuleDict) for each in self.modules()):
            loss = learned_at_once(self, whole, given)
        else:  # what those of one's own are made of may be anybody's, and get a gradient
            loss = whole(given)

        def commit() -> None:
            for each in commits:
                each()

        return Staged(loss, commit)

    def get_indices_tuple(self, i: Any, embeddings: Tensor, labels: Tensor | None, indices_tuple: Any = None) -> Any:
        """What the loss in place, or of name, `i` is given: the choice of its miner, if it has one."""
        miner = self._miner(i)
        return indices_tuple if miner is None else miner(embeddings, labels)

    def _keys(self) -> list[Any]:
        """What the losses are looked up by: names, or positions."""
        return list(cast("dict[str, Loss]", self.losses)) if self.is_dict else list(range(len(self.losses)))

    def _miner(self, key: Any) -> Miner | None:
        if not self.miners or (self.is_dict and key not in self.miners):
            return None
        return cast("dict[Any, Miner | None]", self.miners)[key]

    def _check(self, what: str, given: Any) -> None:
        """Refuses miners or weights that do not belong to the losses."""
        named = isinstance(given, Mapping | nn.ModuleDict)
        if self.is_dict != named:
            form = "a dictionary" if self.is_dict else "a list"
            raise Mismatch(f"losses are {form}, so {what} must be one too, got {type(given).__name__}")
        if not named and len(given) != len(self.losses):
            raise Mismatch(f"there are {len(self.losses)} losses, so there must be as many {what}, got {len(given)}")
        if named and not set(given) <= set(self._keys()):
            raise Mismatch(f"{what} are given for {sorted(set(given) - set(self._keys()))}, which no loss is called")
        if named and what == "weights" and set(given) != set(self._keys()):
            raise Mismatch(f"weights are missing for {sorted(set(self._keys()) - set(given))}")


def _check_kind(what: str, given: Any, kind: type[Component]) -> None:
    """Refuses a component of another kind; a module that is no component may be any."""
    for each in given.values() if isinstance(given, Mapping | nn.ModuleDict) else given:
        if each is None and kind is Loss:
            raise TypeError(f"MultipleLosses: {what} must each be a {kind.__name__}, got None")
        if isinstance(each, Component) and not isinstance(each, kind):
            raise TypeError(f"MultipleLosses: {what} must each be a {kind.__name__}, got {type(each).__name__}")


def _is_learned(weight: object) -> bool:
    return isinstance(weight, Tensor) and weight.requires_grad


def _staged(loss: nn.Module, embeddings: Tensor, labels: Tensor | None, indices: Indices | None) -> Staged:
    """The call of a loss without its effects; a module that is not one of gradbank's is simply called."""
    if isinstance(loss, Loss):
        return loss.stage(embeddings, labels, indices)
    return Staged(loss(embeddings, labels, indices), lambda: None)
