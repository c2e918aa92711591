"""Work in several processes, which joblib keeps for the next time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from joblib import Parallel, delayed

from nnunet_lomix.errors import LoMixError

Result = TypeVar("Result")


def in_processes(function: Callable[..., Result], calls: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[Result]:
    """What the function returns for each of the arguments, in any order, one by one; in as many processes as it needs.

    Files among the arguments must have whole paths: processes that joblib has kept are in the folder in which they
    were started.

    Raises:
        LoMixError: the function does, or joblib's temporary folder has a name that it can't hand on.
    """
    try:
        yield from Parallel(max(1, min(jobs, len(calls))), return_as="generator_unordered")(
            delayed(function)(*call) for call in calls
        )
    except UnicodeEncodeError:
        raise LoMixError(
            "joblib's temporary folder has a name that isn't ASCII: set JOBLIB_TEMP_FOLDER to another one, or give "
            "--jobs 1."
        ) from None
