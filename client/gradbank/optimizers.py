"""The optimizers of torch that the weights of a hosted loss can have."""

import torch

from gradbank.errors import InvalidRequest
from gradbank.suggestion import did_you_mean

_NAMES = (
    *("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adafactor", "Adamax", "ASGD", "Muon", "NAdam", "RAdam"),
    *("RMSprop", "Rprop"),
)  # all but LBFGS, which calls the loss itself, and SparseAdam, for gradients that are no whole tensors


def optimizer_named(name: object) -> type[torch.optim.Optimizer]:
    """The class in `torch.optim` that is called so.

    Raises:
        InvalidRequest: none that can be had is.
    """
    if not isinstance(name, str):
        told = f"the class {name.__name__}" if isinstance(name, type) else f"a {type(name).__name__}"
        raise InvalidRequest(
            f'the optimizer of a hosted loss is made by its name, as loss_fn.optimizer("SGD", lr=0.1), got {told}'
        )
    if name not in _NAMES:
        raise InvalidRequest(f"no optimizer is called {name!r}{did_you_mean(name, _NAMES)}")
    made: type[torch.optim.Optimizer] = getattr(torch.optim, name)
    return made
