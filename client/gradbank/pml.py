"""From a live object of pytorch-metric-learning (PML) to the component that computes the same."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradbank import evaluation, samplers
from gradbank.arguments import argument_fields
from gradbank.component import Component, components
from gradbank.losses import CrossBatchMemory

PACKAGE = "pytorch_metric_learning"
_ABSENT = object()
_GATHER = "gather the batches of all ranks first, as docs/losses.md has it"
_INSTEAD = {
    "DistributedLossWrapper": "which gradbank has none of: convert the loss within it (its .loss). Ranks that open one "
    f"session share the queue of its CrossBatchMemory; for any other loss of pairs {_GATHER}",
    "DistributedMinerWrapper": f"which gradbank has none of: convert the miner within it (its .miner), and {_GATHER}",
    "GenericPairLoss": "which computes nothing by itself: derive your loss from gradbank.losses.GenericPairLoss",
}


def from_pml(obj: nn.Module) -> Any:
    """The component that computes what a loss, distance, miner, reducer or regularizer of PML does.

    It has the same name and arguments, and copies of the weights and of a memory's queue; what is inside is converted
    too. The original is left as it is. PML's own class must be exactly that: what a subclass or a replaced method
    changes cannot be read off an object.

    Raises:
        TypeError: an object of another class, one that was changed by hand, or a class that gradbank does not have; the
            message says where it lies.
        ValueError: an argument that the component refuses.
    """
    return _converted(obj, type(obj).__name__, {})


def _converted(obj: nn.Module, where: str, known: dict[int, Component]) -> Component:
    """`known` are the components made so far, by the originals' ids: what was shared stays shared."""
    if isinstance(obj, Component):
        return obj
    if id(obj) in known:
        return known[id(obj)]
    made = _class_of(obj, where)
    _check_unchanged(obj, where)
    arguments = {}
    for each in argument_fields(made):
        found = _found(obj, each.name, where)
        if each.name == "collect_stats" and not found:
            continue  # as one is that was never asked
        if found is not _ABSENT:
            arguments[each.name] = _value(found, f"{where}.{each.name}", known)
    try:
        component = made(**arguments)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where} cannot be converted: {error}") from None
    _check_equal(obj, component, where)
    _copy_state(obj, component, where)
    known[id(obj)] = component.train(obj.training)
    return component


def _class_of(obj: nn.Module, where: str) -> type[Component]:
    cls = type(obj)
    if isinstance(obj, type):
        raise TypeError(f"from_pml converts objects, got the class {obj.__name__}: give it {obj.__name__}(...)")
    if not isinstance(obj, nn.Module) and cls.__module__.startswith(f"{PACKAGE}."):
        raise TypeError(f"{where} is PML's {cls.__name__}, which holds nothing to convert{_instead(cls.__name__)}")
    if not isinstance(obj, nn.Module) or not cls.__module__.startswith(f"{PACKAGE}."):
        base = next((each.__name__ for each in cls.__mro__ if each.__module__.startswith(f"{PACKAGE}.")), None)
        kind = f"a subclass of PML's {base}" if base else f"no class of {PACKAGE}"
        raise TypeError(
            f"{where} is a {cls.__module__}.{cls.__qualname__}, {kind}: what it computes cannot be read off it; write "
            "it as a gradbank component"
        )
    made = components().get(cls.__name__)
    if made is None or not made.__module__.startswith("gradbank."):
        told = _INSTEAD.get(cls.__name__, "which gradbank does not have")
        raise TypeError(f"{where} is PML's {cls.__name__}, {told}")
    return made


def _instead(name: str) -> str:
    """Where gradbank has the class that PML calls so, if it is no component."""
    places = (evaluation, samplers)
    found = [each.__name__ for each in places if hasattr(each, name)]
    return f": build {found[0]}.{name} with the same arguments" if found else ", and which gradbank does not have"


def _check_unchanged(obj: nn.Module, where: str) -> None:
    """Refuses an object, or a class of PML, whose methods were replaced, and hooks."""
    replaced = [name for name, value in vars(obj).items() if callable(value) and hasattr(type(obj), name)]
    for cls in type(obj).__mro__:
        if cls.__module__.startswith(f"{PACKAGE}."):
            methods = {name: value for name, value in vars(cls).items() if inspect.isfunction(value)}
            replaced += [name for name, value in methods.items() if not value.__module__.startswith(f"{PACKAGE}.")]
    if replaced:
        raise TypeError(f"{where}.{replaced[0]} was replaced by a function of your own, which cannot be converted")
    if obj._forward_hooks or obj._forward_pre_hooks or obj._backward_hooks or obj._backward_pre_hooks:
        raise TypeError(f"{where} has hooks, which cannot be converted: remove them first")


def _found(obj: Any, name: str, where: str) -> Any:
    """What `obj` was given for the argument `name`; `_ABSENT` if its class takes none, and the default will do."""
    cls = type(obj)
    if name == "weight_init_func":
        return _ABSENT  # the weights that it made are copied
    if name == "reducer" and _is_pml(getattr(obj, name, None), "MultipleReducers"):
        return _one_reducer(obj)
    if (cls.__name__, name) in _KEPT_OTHERWISE:
        return _KEPT_OTHERWISE[cls.__name__, name](obj)
    if not hasattr(obj, name) and name in inspect.signature(cls.__init__).parameters:
        raise TypeError(f"{where}.{name} is not kept by PML's {cls.__name__}, and so cannot be converted")
    return getattr(obj, name, _ABSENT)


def _is_pml(value: object, name: str) -> bool:
    return type(value).__name__ == name and type(value).__module__.startswith(f"{PACKAGE}.")


def _one_reducer(obj: Any) -> Any:
    """The reducer of which PML made one for each part of the loss, if that is how they came about."""
    held = obj.reducer
    if not hasattr(obj, "sub_loss_names"):
        return held
    parts = obj._sub_loss_names() if hasattr(obj, "_sub_loss_names") else obj.sub_loss_names()
    of_parts = [dict(held.reducers.items()).get(part, held.default_reducer) for part in parts]
    specs = [_converted(each, "reducer", {}).spec() for each in of_parts]
    return of_parts[0] if all(spec == specs[0] for spec in specs) else held


def _value(value: Any, where: str, known: dict[int, Component]) -> Any:
    if isinstance(value, nn.ModuleDict | Mapping):
        return {key: _value(item, f"{where}[{key!r}]", known) for key, item in value.items()}
    if isinstance(value, nn.ModuleList | list | tuple):
        items = [_value(item, f"{where}[{i}]", known) for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, nn.Module):
        return _converted(value, where, known)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.generic):
        return value.item()
    if callable(value) and getattr(value, "__module__", "").startswith(f"{PACKAGE}."):
        return None  # PML's default
    if value is None or isinstance(value, bool | int | float | str) or callable(value):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}, which cannot be converted")


def _check_equal(obj: Any, component: Component, where: str) -> None:
    """Refuses an object whose attributes were set to what its class does not offer."""
    for name in ("is_inverted", "normalize_embeddings"):
        theirs, ours = getattr(obj, name, None), getattr(component, name, None)
        if None not in (theirs, ours) and theirs != ours:
            raise TypeError(f"{where}.{name} is {theirs}, and in gradbank's {type(component).__name__} it is {ours}")


def _copy_state(obj: Any, component: Any, where: str) -> None:
    given = [each.name for each in argument_fields(type(component)) if not each.metadata.get("weight")]
    for name, parameter in obj.named_parameters(recurse=False):
        if name in given:
            continue
        ours = getattr(component, name, None)
        if not isinstance(ours, nn.Parameter) or ours.shape != parameter.shape:
            raise TypeError(
                f"{where}.{name} cannot be converted: gradbank's {type(component).__name__} has no such weights"
            )
        setattr(component, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    if isinstance(component, CrossBatchMemory) and (obj.queue_idx or obj.has_been_filled):
        names = ("embedding_memory", "label_memory", "queue_idx", "has_been_filled")
        try:
            component.load_state_dict({name: torch.as_tensor(getattr(obj, name)) for name in names}, strict=False)
        except RuntimeError as error:
            raise ValueError(f"{where} cannot be converted: {str(error).splitlines()[-1].strip()}") from None
    if type(obj).__name__ == "HDCMiner" and obj.was_set_externally:
        component.set_idx_externally((obj.a1, obj.p, obj.a2, obj.n), None)
    if type(obj).__name__ == "DynamicSoftMarginLoss":
        component.hist_ = obj.hist_.clone()


def _shortest(near: float, kept: float, keep: Callable[[float], float]) -> float:
    """The shortest number close to `near` that PML would keep as `kept`."""
    shorter = (float(f"{near:.{digits}g}") for digits in range(1, 17))
    return next((number for number in shorter if keep(number) == kept), near)


def _degrees(radians: Any) -> float:
    return _shortest(math.degrees(radians), float(radians), lambda number: float(np.radians(number)))


def _per_class(miner: Any) -> int:
    """K, from the mask that has each center's later ones of its class."""
    return int(miner.same_class_mask[0].sum()) + 1


def _beta(loss: Any) -> float:
    beta = loss.beta.detach()
    if not loss.learn_beta and not bool((beta == beta[0]).all()):  # what is learned is copied as weights
        raise TypeError("MarginLoss.beta was set to a number per class, which cannot be converted: it is not learned")
    return _shortest(beta[0].item(), beta[0].item(), lambda number: torch.tensor(number).item())


_SOFTMAXES = ("ArcFace", "CosFace", "LargeMarginSoftmax", "NormalizedSoftmax", "SphereFace", "SubCenterArcFace")

_KEPT_OTHERWISE: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("AngularLoss", "alpha"): lambda loss: _degrees(loss.alpha),
    ("AngularMiner", "angle"): lambda miner: _degrees(miner.angle),
    ("ArcFaceLoss", "margin"): lambda loss: _degrees(loss.margin),
    ("HistogramLoss", "n_bins"): lambda loss: None,  # only `delta` is kept, which says the same
    ("MarginLoss", "beta"): _beta,
    ("MarginLoss", "num_classes"): lambda loss: None if len(loss.beta) == 1 else len(loss.beta),
    ("NormalizedSoftmaxLoss", "num_classes"): lambda loss: loss.W.shape[1],
    ("ProxyAnchorLoss", "embedding_size"): lambda loss: loss.proxies.shape[1],
    ("ProxyNCALoss", "embedding_size"): lambda loss: loss.proxies.shape[1],
    ("ProxyNCALoss", "num_classes"): lambda loss: loss.proxies.shape[0],
    ("SoftTripleLoss", "embedding_size"): lambda loss: loss.fc.shape[0],
    ("SoftTripleLoss", "gamma"): lambda loss: _shortest(1 / loss.gamma, loss.gamma, lambda number: 1 / number),
    ("SparseCentersRegularizer", "centers_per_class"): _per_class,
    ("SparseCentersRegularizer", "num_classes"): lambda cost: len(cost.same_class_mask) // _per_class(cost),
    ("SubCenterArcFaceLoss", "margin"): lambda loss: _degrees(loss.margin),
    ("TupletMarginLoss", "margin"): lambda loss: _degrees(loss.margin),
    ("VICRegLoss", "distance"): lambda loss: _ABSENT,  # PML's has one, and makes no use of it
    **{(f"{name}Loss", "embedding_size"): lambda loss: loss.W.shape[0] for name in _SOFTMAXES},
}
