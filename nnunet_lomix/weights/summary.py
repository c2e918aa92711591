"""The numbers of several folds: shares of scales and operators, agreement, one sentence, two tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rich import box
from rich.table import Column, Table
from rich.text import Text

from nnunet_lomix.loss.maps import Map

NOTABLE = 10  # %; weights that are so close to equal ones have told nothing apart
ROW = ["group", "fold", "epoch", "map"]  # what a row of weights.csv is about
AGREEING = 0.5  # correlation between folds from which a ranking of the maps is theirs, not chance


@dataclass(frozen=True)
class Group:
    """Folds that are shown together.

    Attributes:
        name: what they are called.
        histories: for each fold, by name, the weights: a row for each epoch, a column for each map; NaN for epochs
            without LoMix, of which the last one is none.
        maps: those of all folds.
    """

    name: str
    histories: Mapping[str, pd.DataFrame]
    maps: Sequence[Map]

    @property
    def last(self) -> pd.DataFrame:
        """Share of each map (row) in the weight after the last epoch of each fold (column)."""
        last = pd.DataFrame({fold: history.iloc[-1] for fold, history in self.histories.items()})
        return last.loc[[m.name for m in self.maps]] / last.sum()

    @property
    def relative(self) -> pd.DataFrame:
        """:attr:`last` as multiples of an equal weight."""
        return self.last * len(self.maps)


def shares(group: Group) -> pd.DataFrame:
    """Share of each scale, and of each operator, in the weight.

    A map's weight is split evenly over the scales of its subset.

    Returns:
        A row for each ``("scale", "0")`` and ``("operator", "add")``; columns ``equal``, what equal weights would give,
        ``mean`` over folds, and ``low`` and ``high``, the folds' extremes.
    """
    rows = {}
    for m in group.maps:
        parts = {("scale", str(scale)): 1 / len(m.scales) for scale in m.scales}
        rows[m.name] = parts | {("operator", m.operator): 1.0}
    parts = pd.DataFrame.from_dict(rows, orient="index").fillna(0.0)
    scales = sorted((key for key in parts if key[0] == "scale"), key=lambda key: int(key[1]))
    parts = parts[scales + [key for key in parts if key[0] == "operator"]]
    folds = parts.T @ group.last
    columns = {"equal": parts.mean(), "mean": folds.mean(axis=1), "low": folds.min(axis=1), "high": folds.max(axis=1)}
    return pd.DataFrame(columns)


def agreement(group: Group) -> float:
    """Mean of Spearman's correlation over all pairs of folds; NaN for one fold, and with equal weights."""
    correlations = group.last.corr(method="spearman").to_numpy()
    pairs = correlations[np.triu_indices_from(correlations, k=1)]
    return float(pairs.mean()) if len(pairs) else float("nan")


def summarise(group: Group) -> str:
    """What mattered, in one sentence that the numbers allow."""
    relative, mean = group.relative, group.relative.mean(axis=1)
    in_any, in_mean = (100 * (part - 1).abs().to_numpy().max() for part in (relative, mean))
    if in_any < NOTABLE:
        return (
            "Neither scales nor operators were told apart: no map differs from equal weights by more than "
            f"{in_any:.1f} %."
        )
    if in_mean < NOTABLE:  # what one training raised another one lowered
        parts = [
            f"single trainings differ from equal weights by up to {in_any:.0f} %, but their mean by no more than "
            f"{in_mean:.1f} %"
        ]
    else:
        table = shares(group)
        gains = 100 * (table["mean"] / table["equal"] - 1)
        parts = [_describe_gains(kind, gains[kind]) for kind in ("scale", "operator") if len(gains[kind]) > 1]
        parts.append(
            f"the heaviest map, {mean.idxmax()}, has {mean.max():.2f} times an equal weight, the lightest, "
            f"{mean.idxmin()}, {mean.min():.2f} times"
        )
    text = "; ".join([*parts, _describe_agreement(group)])
    return f"{text[0].upper()}{text[1:]}."


def _describe_gains(kind: str, gains: pd.Series) -> str:
    if gains.abs().max() < NOTABLE:
        return f"no {kind} differs from equal weights by more than {gains.abs().max():.1f} %"
    best, worst = gains.idxmax(), gains.idxmin()
    return (
        f"against equal weights {kind} {best} gained most ({percent(gains[best])}), {worst} least "
        f"({percent(gains[worst])})"
    )


def _describe_agreement(group: Group) -> str:
    if len(group.histories) < 2:
        return "this is one training, another one may differ"
    correlation = agreement(group)
    if np.isnan(correlation):
        return "one training has equal weights, so there is no agreement to speak of"
    verdict = "agree on it" if correlation >= AGREEING else "do not agree on it, so take it for chance"
    return f"the {len(group.histories)} trainings {verdict} (mean correlation {with_minus(f'{correlation:.2f}')})"


def percent(value: float) -> str:
    """
    >>> percent(-0.3), percent(-12.0)
    ('+0 %', '−12 %')
    """
    return with_minus(f"{round(value):+d} %")


def with_minus(number: str) -> str:
    """With a minus sign in place of the hyphen that Python writes."""
    return number.replace("-", "−")


def tabulate(groups: Sequence[Group]) -> Table:
    """For the terminal: a column for each group, a row for each scale and operator, and what tells of the folds."""
    columns = [_write_column(group) for group in groups]
    titles = [Column(Text(group.name), justify="right", overflow="fold") for group in groups]
    table = Table("", *titles, box=box.SIMPLE_HEAD, show_edge=False, show_header=len(groups) > 1)
    for row in dict.fromkeys(name for column in columns for name in column):
        table.add_row(row, *(column.get(row, "") for column in columns))
    return table


def _write_column(group: Group) -> dict[str, str]:
    lengths = [len(history) for history in group.histories.values()]
    relative = group.relative.mean(axis=1)
    column = {
        "folds": ", ".join(fold.removeprefix("fold_") for fold in group.histories),
        "epochs": " to ".join(map(str, sorted({min(lengths), max(lengths)}))),
        "heaviest": f"{relative.idxmax()} ({relative.max():.2f})",
        "lightest": f"{relative.idxmin()} ({relative.min():.2f})",
    }
    if len(lengths) > 1:
        column["agreement"] = with_minus(f"{agreement(group):.2f}")
    for (kind, name), share in (100 * shares(group)).iterrows():
        low, high = (f"{share[end]:.1f}" for end in ("low", "high"))
        several = f" ({low} to {high})" if low != high else ""
        gain = percent(100 * (share["mean"] / share["equal"] - 1))
        column[f"scale {name}" if kind == "scale" else name] = f"{share['mean']:.1f}{several} {gain:>6}"
    return column


def list_weights(groups: Sequence[Group]) -> pd.DataFrame:
    """A row for each group, fold, epoch and map.

    Columns: ``group``, ``fold``, ``epoch``, ``map``, ``operator``, ``scales``, ``weight``, ``share`` (of all weight),
    ``relative`` (to equal weights).
    """
    parts = []
    for group in groups:
        names = [m.name for m in group.maps]
        maps = pd.DataFrame({"operator": [m.operator for m in group.maps], "scales": [m.subset for m in group.maps]})
        for fold, history in group.histories.items():
            share = history.div(history.sum(axis=1, min_count=1), axis=0)  # NaN for epochs without LoMix
            values = {"weight": history, "share": share, "relative": share * len(names)}
            rows = pd.MultiIndex.from_product([[group.name], [fold], range(len(history)), names], names=ROW)
            columns = {name: np.tile(column, len(history)) for name, column in maps.items()}
            columns |= {name: table[names].to_numpy().ravel() for name, table in values.items()}
            parts.append(pd.DataFrame(columns, index=rows))
    return pd.concat(parts).reset_index()
