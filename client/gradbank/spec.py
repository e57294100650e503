"""What a component is built from, told apart from the component."""

from typing import Any, NamedTuple

from torch import Tensor


class Spec(NamedTuple):
    """What a component is built from, fit for the wire: its name, and its arguments with components as specs."""

    name: str
    arguments: dict[str, Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self.name == other.name and same(self.arguments, other.arguments)

    def __ne__(self, other: object) -> bool:  # that of a tuple would compare tensors by `!=`
        return not self == other

    def title(self) -> str:
        """The name, with that of the loss inside, as in `CrossBatchMemory(NTXentLoss)`."""
        inner = self.arguments.get("loss")
        return f"{self.name}({inner.title()})" if isinstance(inner, Spec) else self.name


def same(a: Any, b: Any) -> bool:
    """Whether two arguments of specs are equal: tensors entry by entry, lists and tuples item by item."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        a, b = a.detach().cpu(), b.detach().cpu()
        return bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, Spec) or isinstance(b, Spec):
        return bool(a == b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)
