"""What every loss is: called with its effects or without, in any mode of torch, and with a cost of its embeddings."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gradbank.component import Component, foundation
from gradbank.engine.surroundings import uncompiled
from gradbank.locks import lock_of
from gradbank.mismatch import Mismatch
from gradbank.reducers.kept import part_of_all
from gradbank.regularizers import Regularizer


class Staged(NamedTuple):
    """A loss that was computed, and what is left to do for the call to have happened.

    `commit` puts references and integers in place and nothing else: until it is called, whatever the loss
    remembers is as it was.
    """

    loss: Tensor
    commit: Callable[[], None]


@foundation
class Loss(Component):
    """A loss that is called as `loss_fn(embeddings, labels, ...)` and backpropagates to the embeddings.

    Args:
        embedding_regularizer: a cost of the embeddings themselves, added to the loss.
        embedding_reg_weight: what that cost is multiplied by.
    """

    embedding_regularizer: Regularizer | None = field(default=None, kw_only=True)
    embedding_reg_weight: float = field(default=1.0, kw_only=True)

    remembers: ClassVar[bool] = False
    """Whether a call leaves something to the next one, which `stage` keeps apart until it is committed."""

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, with its hooks; in `torch.inference_mode` as under `no_grad`, whose tensors are as any others."""
        if not torch.is_inference_mode_enabled() and not any(map(_is_of_inference, (*args, *kwargs.values()))):
            return super().__call__(*args, **kwargs)
        copies: dict[int, Any] = {}
        recorded = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(recorded):
            args, kwargs = _ordinary(args, copies), {name: _ordinary(each, copies) for name, each in kwargs.items()}
            return super().__call__(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: a loss is called as it is, whatever compiles what is around it."""

    def take_state(self, state: Mapping[str, Tensor]) -> None:
        """Loads what a `state_dict` has of this loss, and weights in the dtype that they have there."""
        for name, weight in self.named_parameters():
            if name in state and state[name].is_floating_point():
                weight.data = weight.data.to(state[name].dtype)
        self.load_state_dict(state, strict=False)

    def stage(self, *args: Any, **kwargs: Any) -> Staged:
        """The call, without its effects; a loss that remembers something overrides this one."""
        return Staged(self(*args, **kwargs), lambda: None)

    def carried_out(self, *args: Any, **kwargs: Any) -> Tensor:
        """`stage`, and then its effects; one thread at a time, where something remembers: the next is to see them."""
        remembering = [each for each in self.modules() if isinstance(each, Loss) and each.remembers]
        with ExitStack() as held:
            for each in sorted(remembering, key=id):  # in one order, or two threads would wait for each other
                held.enter_context(lock_of(each))
            staged = self.stage(*args, **kwargs)
            staged.commit()
        return staged.loss

    def regularized(self, loss: Any, embeddings: Tensor) -> Any:
        """`loss` with the cost of the `(B, D)` embeddings added, if the loss has a regularizer."""
        return self.with_cost(loss, "embedding", self.embedding_regularizer, embeddings, self.embedding_reg_weight)

    def add_embedding_regularization_to_loss_dict(self, loss_dict: dict[str, Any], embeddings: Tensor) -> None:
        """Adds the cost of the embeddings to the parts that `compute_loss` gives, for a `forward` of your own."""
        loss_dict.update(self.regularized({}, embeddings))

    def with_cost(self, loss: Any, name: str, regularizer: Regularizer | None, rows: Tensor, weight: float) -> Any:
        """`loss` with the weighted cost of some rows added to it, or to its parts if it was not reduced."""
        if regularizer is None:
            return loss
        cost = regularizer(rows)
        if isinstance(cost, Mapping):
            raise Mismatch(f"the {name}_regularizer gives its parts: give it a reducer that makes one number of them")
        cost = cost * weight
        if isinstance(loss, Tensor):
            return loss + cost
        return {**loss, f"{name}_reg_loss": part_of_all(cost)}


def _is_of_inference(value: Any) -> bool:
    """Whether it is, or has in a tuple of indices, a tensor of `torch.inference_mode`."""
    if isinstance(value, Tensor):
        return value.is_inference()
    return isinstance(value, tuple) and any(map(_is_of_inference, value))


def _ordinary(value: Any, copies: dict[int, Any]) -> Any:
    """The same, with copies of tensors of `torch.inference_mode`: one of each, for it may matter which is which."""
    if isinstance(value, Tensor) and value.is_inference():
        return copies.setdefault(id(value), value.clone())
    return tuple(_ordinary(each, copies) for each in value) if isinstance(value, tuple) else value
