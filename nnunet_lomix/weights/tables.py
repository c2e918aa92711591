"""The tables that the terminal shows."""

from collections.abc import Mapping, Sequence

import pandas as pd
from rich import box
from rich.table import Column, Table
from rich.text import Text

from nnunet_lomix.weights.summary import Group, agreement, folds_differ, percent, relative_weights, with_minus


def make_fold_table(groups: Sequence[Group]) -> Table:
    """A row for each fold, with its heaviest and lightest map as multiples of an equal weight."""
    table = Table(
        Column("fold", overflow="fold"),
        "epochs",
        "heaviest map",
        "lightest",
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    captions = []
    for group in groups:
        relative = relative_weights(group.last)
        title = f"{group.name}: " if len(groups) > 1 else ""
        if title:
            table.add_row(Text(group.name, style="bold"))
        for fold, history in group.histories.items():
            own = relative[fold]
            heaviest, lightest = (f"{name} ({own[name]:.2f})" for name in (own.idxmax(), own.idxmin()))
            table.add_row(fold, str(len(history)), heaviest, lightest)
        table.add_section()
        if len(group.histories) > 1:
            spread, correlation = 100 * relative.std(axis=1), agreement(group.last)
            captions.append(
                f"{title}Agreement: mean Spearman correlation of two folds {with_minus(f'{correlation:.2f}')}; "
                f"between folds the weight of a map varies by {spread.mean():.0f} % of an equal one (standard "
                f"deviation, mean over maps; {spread.idxmax()} most, {spread.max():.0f} %)."
            )
    table.caption = Text("\n".join(captions)) if captions else None
    table.caption_justify = "left"
    return table


def make_share_table(kind: str, parts: Mapping[str, pd.DataFrame]) -> Table:
    """A row for each scale or operator, as ``kind`` says, and a column for each group.

    Args:
        kind: the title of the first column.
        parts: as from :func:`~nnunet_lomix.weights.summary.shares`, by name of the group.
    """
    rows = list(dict.fromkeys(name for part in parts.values() for name in part.index))
    (first, *others) = parts.values()
    have_equal = all(first["equal"].equals(other["equal"]) for other in others)
    table = Table(kind, box=box.SIMPLE_HEAD, show_edge=False)
    if have_equal:  # what equal weights would give; groups with different maps differ in that
        table.add_column("equal, %", justify="right")
    for name in parts:
        title = "share, %" if len(parts) == 1 else f"{name}\nshare, %"
        table.add_column(Text(title), justify="right", overflow="fold")
    for row in rows:
        equal = [f"{100 * first.loc[row, 'equal']:.1f}"] if have_equal else []
        table.add_row(row, *equal, *(_write_share(part, row) for part in parts.values()))
    return table


def _write_share(part: pd.DataFrame, row: str) -> str:
    """The share in %, its range over folds, and how much more or less than with equal weights it is."""
    if row not in part.index:
        return ""
    share = 100 * part.loc[row]
    several = f" ({share['low']:.1f} to {share['high']:.1f})" if folds_differ(part) else ""
    return f"{share['mean']:.1f}{several} {percent(100 * (share['mean'] / share['equal'] - 1)):>6}"
