"""A report in Markdown; what it looks like is in ``report.md``."""

import re
from pathlib import Path

import jinja2

from nnunet_lomix.compare.content import Report


def to_markdown(report: Report) -> str:
    """The report as a text, in which every value is shown as it is."""
    environment = jinja2.Environment(
        # every value of the template passes here, as with autoescape in HTML
        finalize=_escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = Path(__file__).with_name("report.md").read_text(encoding="utf-8")
    return environment.from_string(template).render(report=report)


def _escape(value: object) -> str:
    """Text that Markdown shows as it is, in a cell of a table, too.

    >>> print(_escape("tumour | <b>"))
    tumour \\| \\<b\\>
    """
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", str(value)).replace("\n", " ")
