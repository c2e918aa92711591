"""How a trainer ends nnU-Net's command where the user can help."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from nnunet_lomix.errors import LoMixError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def ends_with_a_sentence(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """What a user can mend ends nnU-Net's command with its sentence, not with a traceback."""

    @wraps(method)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return method(*args, **kwargs)
        except LoMixError as error:
            raise SystemExit(str(error)) from None

    return wrapped
