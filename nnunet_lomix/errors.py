"""What the package raises where a user can help: one sentence that names the thing and the remedy.

Library code raises these and imports no command line, though a sentence may name one of its options. ``cli.py`` and the
trainers show the sentence alone, without a traceback.
"""


class LoMixError(Exception):
    """Something that the user can mend; its text is one whole sentence."""


class UsageError(LoMixError):
    """The arguments don't fit together."""


def describe(error: BaseException) -> str:
    """What somebody else's code raised, for a sentence: its type and the first line of its text.

    >>> describe(ImportError("No module named 'unknown'"))
    "ImportError: No module named 'unknown'"
    """
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
