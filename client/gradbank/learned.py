"""Which tensors of a component get a gradient: its weights, and arguments that are learned."""

from torch import Tensor, nn

from gradbank.component import Component, argument_fields


def learned_arguments(whole: nn.Module) -> list[Tensor]:
    """Arguments, of a component and of those within it, that require a gradient: a temperature that is a parameter, or
    made of one, as in `loss_fn.temperature = log_t.exp()`."""
    found: list[Tensor] = []
    for part in whole.modules():
        held = [name for each in (part._buffers, part._parameters) for name, t in each.items() if _is_learned(t)]
        if held and isinstance(part, Component):
            given = {each.name for each in argument_fields(type(part)) if not each.metadata.get("weight")}
            found += [getattr(part, name) for name in held if name in given]
    return found


def learned_tensors(whole: nn.Module) -> list[Tensor]:
    """All that get a gradient: parameters, and learned arguments that are none."""
    return [each for each in (*whole.parameters(), *whole.buffers()) if each.requires_grad]


def _is_learned(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
