"""Which tensors of a component get a gradient: its weights, and arguments that are learned."""

from torch import Tensor, nn

from gradbank.component import Component, argument_fields


def learned_arguments(whole: nn.Module) -> list[Tensor]:
    """Arguments, of a component and of those within it, that require a gradient: a temperature that is a parameter, or
    made of one, as in `loss_fn.temperature = log_t.exp()`. Not those that a class of one's own makes its parameters,
    which are weights as any others."""
    found: list[Tensor] = []
    for part in whole.modules():
        ours = type(part).__module__.startswith("gradbank.")
        held = {**part._buffers, **(part._parameters if ours else {})}
        learned = {name: each for name, each in held.items() if each is not None and each.requires_grad}
        if learned and isinstance(part, Component):
            given = {each.name for each in argument_fields(type(part)) if not each.metadata.get("weight")}
            found += [each for name, each in learned.items() if name in given]
    return found


def learned_tensors(whole: nn.Module) -> list[Tensor]:
    """All that get a gradient: parameters, and learned arguments that are none."""
    return [each for each in (*whole.parameters(), *whole.buffers()) if each.requires_grad]
