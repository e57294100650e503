"""Methods that subclasses of pytorch-metric-learning's classes override, and that nobody would call here."""

from collections.abc import Iterable


def refuse_uncalled(cls: type, names: Iterable[str], instead: str, base: str | None = None) -> None:
    """Refuses a class that has one of some methods of its own, or of a mixin: they would change nothing without a word.

    Args:
        instead: what to do in place of that.
        base: what does not call them; None is the class of ours that this one is written on.

    Raises:
        TypeError: it does.
    """
    lost = uncalled(cls, names)
    if lost:
        ours = next(each for each in cls.__mro__[1:] if is_ours(each))
        verb = "does not call" if base is None else "do not call"
        raise TypeError(f"{cls.__name__} overrides {', '.join(lost)}, which {base or ours.__name__} {verb}: {instead}")


def uncalled(cls: type, names: Iterable[str]) -> list[str]:
    """Those of some methods that a class has of its own, or of a mixin."""
    return [name for name in names if callable(getattr(cls, name, None)) and not is_ours(cls, name)]


def is_ours(cls: type, name: str | None = None) -> bool:
    """Whether a class is of this package, or has the method of that name as this package defines it."""
    return str((cls if name is None else getattr(cls, name)).__module__).startswith("gradbank.")
