"""Names for the exchangeable parts: operators, weighting rules and backends."""


class Registry(dict):
    """A dictionary from names to parts of one kind, filled by a decorator.

    >>> COLOURS = Registry("colour")
    >>> @COLOURS.register("red")
    ... def red(): ...
    >>> COLOURS["blue"]
    Traceback (most recent call last):
    ...
    ValueError: unknown colour 'blue'; choose from: red
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(self, name: str):
        """Decorator that registers a class or function under ``name``.

        The same part may be registered again: nnU-Net imports the files in a user's folder anew for every look-up.

        Raises:
            ValueError: another part has the name.
        """

        def decorator(part):
            if name in self and source(self[name]) != source(part):
                raise ValueError(f"{self.kind} {name!r} is registered already; choose another name")
            self[name] = part
            return part

        return decorator

    def __missing__(self, name):
        raise ValueError(f"unknown {self.kind} {name!r}; choose from: {', '.join(sorted(self))}")


def source(part) -> tuple[str, str]:
    """Where a class or function is defined."""
    return part.__module__, part.__qualname__
