"""What the package raises where a user can help: one sentence that names the thing and the remedy.

Library code raises these and imports no command line, though a sentence may name one of its options. ``cli.py`` and the
trainers show the sentence alone, without a traceback.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

SHOWN = 5  # names in a sentence


class LoMixError(Exception):
    """Something that the user can mend; its text is one whole sentence."""


class UsageError(LoMixError):
    """The arguments don't fit together."""


def describe(error: BaseException) -> str:
    """What somebody else's code raised, for a sentence: its type and the first line of its text.

    >>> describe(ImportError("No module named 'unknown'"))
    "ImportError: No module named 'unknown'"

    A line that ends with a colon goes on in the next one; SimpleITK says first where in its own code it failed:

    >>> describe(RuntimeError("Exception thrown in SimpleITK Read: /src/reader.cxx:99:\\nsitk::ERROR: no such file"))
    'RuntimeError: no such file'
    """
    text = re.sub(r":\s*\n", ": ", str(error))
    lines = re.sub("^Exception thrown in SimpleITK .*?ERROR: ", "", text).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Somebody else's code in the block may raise anything at all: it becomes a sentence that begins with ``what``.

    >>> with explaining("The file can't be read"):
    ...     {}["dtype"]
    Traceback (most recent call last):
    nnunet_lomix.errors.LoMixError: The file can't be read: KeyError: 'dtype'.

    Raises:
        LoMixError: the block raised something; its own :class:`LoMixError` stays as it is.
    """
    try:
        yield
    except LoMixError:
        raise
    # a module that is imported may end the process
    except (Exception, SystemExit) as error:
        raise LoMixError(f"{what}: {describe(error).rstrip('.')}.") from error


def shorten(names: Iterable[object], separator: str = ", ") -> str:
    """The first few of some names, each once, and how many more there are.

    >>> shorten("abcadefgh")
    'a, b, c, d, e and 3 more'
    """
    listed = list(dict.fromkeys(map(str, names)))
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return separator.join(listed[:SHOWN]) + more
