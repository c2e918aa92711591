"""Names for the exchangeable parts: operators and weighting rules."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

Part = TypeVar("Part", bound=Callable[..., Any])


class Registry(dict[str, Part], Generic[Part]):
    """A dictionary from names to parts of one kind, filled by a decorator.

    >>> COLOURS = Registry("colour")
    >>> @COLOURS.register("red")
    ... class Red: ...
    >>> COLOURS["blue"]
    Traceback (most recent call last):
    ...
    ValueError: unknown colour 'blue'; choose from: red
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[Part], Part]:
        """Decorator that registers a class under ``name``.

        The same class may be registered again: nnU-Net imports the files in a user's folder anew for every look-up.

        Raises:
            ValueError: another class has the name.
        """

        def decorator(part: Part) -> Part:
            other = self.get(name, part)
            owner = f"{other.__module__}.{other.__qualname__}"
            if owner != f"{part.__module__}.{part.__qualname__}":
                raise ValueError(f"{self.kind} {name!r} is registered already, by {owner}; choose another name")
            self[name] = part
            return part

        return decorator

    def __missing__(self, name: str) -> Part:
        raise ValueError(f"unknown {self.kind} {name!r}; choose from: {', '.join(sorted(self))}")
