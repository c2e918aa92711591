"""The tables that the terminal shows."""

from collections.abc import Mapping

import pandas as pd
from rich import box
from rich.table import Column, Table

from nnunet_lomix.weights.summary import agreement, folds_differ, percent, relative_weights


def make_fold_table(histories: Mapping[str, pd.DataFrame], last: pd.DataFrame) -> Table:
    """A row for each fold, with its heaviest and lightest map as multiples of an equal weight.

    Args:
        histories: as from :func:`~nnunet_lomix.weights.read.read_history`, by name of the fold.
        last: as from :func:`~nnunet_lomix.weights.summary.last_weights`.
    """
    table = Table(
        Column("fold", overflow="fold"),
        "epochs",
        "z_0, %",
        "heaviest other map",
        "lightest",
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    relative = relative_weights(last)
    for fold, history in histories.items():
        own = relative[fold]
        heaviest, lightest = (f"{name} ({own[name]:.2f})" for name in (own.idxmax(), own.idxmin()))
        table.add_row(fold, str(len(history)), f"{100 * last.loc['z_0', fold]:.1f}", heaviest, lightest)
    if len(last.columns) > 1:
        spread = 100 * relative.std(axis=1)
        table.caption = (
            f"Agreement: mean Spearman correlation of two folds {agreement(last):.2f}; between folds the weight of a "
            f"map varies by {spread.mean():.0f} % of an equal one (standard deviation, mean over maps; "
            f"{spread.idxmax()} most, {spread.max():.0f} %)."
        )
        table.caption_justify = "left"
    return table


def make_share_table(kind: str, part: pd.DataFrame) -> Table:
    """A row for each scale or operator, as ``kind`` says.

    Args:
        kind: the title of the first column.
        part: as from :func:`~nnunet_lomix.weights.summary.shares`.
    """
    several = folds_differ(part)
    table = Table(kind, box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("share, %", "folds", "equal, %", "difference"):
        if name != "folds" or several:
            table.add_column(name, justify="right")
    for row in (100 * part).itertuples():
        cells = [str(row.Index), f"{row.mean:.1f}"]
        if several:
            cells.append(f"{row.low:.1f} to {row.high:.1f}")
        table.add_row(*cells, f"{row.equal:.1f}", percent(100 * (row.mean / row.equal - 1)))
    return table
