"""A report on the terminal, at most 80 columns wide."""

from textwrap import wrap

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nnunet_lomix.compare.content import Report
from nnunet_lomix.compare.tables import MetricTable

LEGEND = (
    "p: Wilcoxon's test, after Holm's correction. b:s:w: cases better:same:worse. "
    "*: better or worse by interval, test and seeds; all others are undecided."
)
ABOUT_NETWORKS = " Where a trainer has one training, * is about these networks; another training may show otherwise."
# names are folded, so that all columns fit
WIDTHS = {"class": 12, "trainer": 18, "mean": 6, "difference": 10, "95 % interval": 16, "p": 6, "b:s:w": 8}


def print_report(report: Report, console: Console) -> None:
    """Print the headlines and a table for each metric."""
    for item in report.headlines:
        console.print(Text(item.first, style="" if item.about_networks else "bold"))
        for sentence in (item.seeds, *item.others):
            console.print(Text(sentence))
    for note in report.notes:
        console.print(Text(note))
    for table in report.tables:
        console.print()
        console.print(_to_rich(table))
    about_networks = any(item.about_networks for item in report.headlines)
    console.print(Text(LEGEND + ABOUT_NETWORKS if about_networks else LEGEND))


def _to_rich(table: MetricTable) -> Table:
    shown = Table(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name, width in WIDTHS.items():
        left = name in ("class", "trainer")
        shown.add_column(name, justify="left" if left else "right", max_width=width, overflow="fold")
    for group in table.groups:
        for i, row in enumerate(group.rows):
            mark = "*" if row.verdict in ("better", "worse") else ""
            cells = ["" if i else group.name, _wrap(row.trainer, WIDTHS["trainer"])]
            cells += [row.mean, row.difference + mark, row.interval, row.p, row.counts]
            # text that looks like rich's markup stays text
            shown.add_row(*map(Text, cells), end_section=row is group.rows[-1])
    return shown


def _wrap(name: str, width: int) -> str:
    """Lines that break before an underscore if they can.

    >>> _wrap("nnUNetTrainerLoMix_short_seed0", 18)
    'nnUNetTrainerLoMix\\n_short_seed0'
    """
    return "\n".join(line.replace(" _", "_") for line in wrap(name.replace("_", " _"), width)) or name
