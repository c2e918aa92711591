"""What the weights of several folds tell: shares of scales and operators, agreement, one sentence, one long table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nnunet_lomix.loss.maps import Map

NOTABLE = 0.1  # weights within 10 % of equal ones have told nothing apart
AGREEING = 0.5  # correlation between folds from which a ranking of the maps is theirs, not chance


@dataclass(frozen=True)
class Group:
    """Folds that are shown together, in one column: those of one model, trained with all or with the same few cases.

    Attributes:
        name: what the column is called.
        histories: as from :func:`~nnunet_lomix.weights.read.read_history`, by name of the fold.
        maps: those of all folds.
    """

    name: str
    histories: Mapping[str, pd.DataFrame]
    maps: Sequence[Map]

    @property
    def last(self) -> pd.DataFrame:
        """As from :func:`last_weights`."""
        return last_weights(self.histories)


def share_of_each(history: pd.DataFrame) -> pd.DataFrame:
    """Share of each map in the weight of its epoch; NaN for epochs without LoMix."""
    return history.div(history.sum(axis=1, min_count=1), axis=0)


def last_weights(histories: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Share of each map in the weight after the last epoch: a row for each map, a column for each fold."""
    last = pd.DataFrame({name: history.iloc[-1] for name, history in histories.items()})
    return last.loc[next(iter(histories.values())).columns] / last.sum()


def relative_weights(last: pd.DataFrame) -> pd.DataFrame:
    """Weight of each map as a multiple of what it would be if all were equal."""
    return last * len(last)


def scale_membership(maps: Sequence[Map]) -> pd.DataFrame:
    """How the weight of each map (row) is split over the scales (columns): evenly over those of its subset."""
    scales = sorted({s for m in maps for s in m.scales})
    return pd.DataFrame(
        [[(s in m.scales) / len(m.scales) for s in scales] for m in maps],
        index=[m.name for m in maps],
        columns=list(map(str, scales)),
    )


def operator_membership(maps: Sequence[Map]) -> pd.DataFrame:
    """Which operator (column) the weight of each map (row) belongs to: 1 for its own, 0 for the others."""
    operators = list(dict.fromkeys(m.operator for m in maps))
    rows = [[float(m.operator == operator) for operator in operators] for m in maps]
    return pd.DataFrame(rows, index=[m.name for m in maps], columns=operators)


def shares(last: pd.DataFrame, membership: pd.DataFrame) -> pd.DataFrame:
    """Share of each scale or operator in the weight.

    Args:
        last: as from :func:`last_weights`.
        membership: as from :func:`scale_membership` or :func:`operator_membership`.

    Returns:
        A row for each scale or operator; columns ``equal``, what equal weights would give, ``mean`` over folds, and
        ``low`` and ``high``, the folds' extremes.
    """
    folds = membership.T @ last
    return pd.DataFrame(
        {"equal": membership.mean(), "mean": folds.mean(axis=1), "low": folds.min(axis=1), "high": folds.max(axis=1)}
    )


def folds_differ(part: pd.DataFrame) -> bool:
    """Whether the folds have different shares, so that there is a range to show; ``part`` is as from :func:`shares`."""
    return bool((part["low"] < part["high"]).any())


def agreement(last: pd.DataFrame) -> float:
    """Mean of Spearman's correlation over all pairs of folds; NaN if there is none.

    There is none for one fold, and for a fold with equal weights, which rank nothing.
    """
    correlations = last.corr(method="spearman").to_numpy()
    pairs = correlations[np.triu_indices_from(correlations, k=1)]
    return float(pairs.mean()) if len(pairs) else float("nan")


def summarise(last: pd.DataFrame, maps: Sequence[Map]) -> str:
    """What mattered, in one sentence that the numbers allow."""
    of_folds = relative_weights(last)
    relative = of_folds.mean(axis=1)
    in_any, in_mean = (100 * (part - 1).abs().to_numpy().max() for part in (of_folds, relative))
    if in_any < 100 * NOTABLE:
        return (
            "Neither scales nor operators were told apart: no map differs from equal weights by more than "
            f"{in_any:.1f} %."
        )
    if in_mean < 100 * NOTABLE:  # what one training raised another one lowered
        return (
            f"Single trainings differ from equal weights by up to {in_any:.0f} %, but their mean by no more than "
            f"{in_mean:.1f} %; {_describe_agreement(last)}."
        )
    parts = [
        _extremes("scale", shares(last, scale_membership(maps))),
        _extremes("operator", shares(last, operator_membership(maps))),
        f"the heaviest map, {relative.idxmax()}, has {relative.max():.2f} times an equal weight, "
        f"the lightest, {relative.idxmin()}, {relative.min():.2f} times",
        _describe_agreement(last),
    ]
    text = "; ".join(filter(None, parts))
    return f"{text[0].upper()}{text[1:]}."


def _extremes(kind: str, table: pd.DataFrame) -> str | None:
    """The one that gained most and the one that lost most against equal weights; None if there is only one."""
    if len(table) < 2:
        return None
    gain = 100 * (table["mean"] / table["equal"] - 1)
    if gain.abs().max() < 100 * NOTABLE:
        return f"no {kind} differs from equal weights by more than {gain.abs().max():.1f} %"
    best, worst = gain.idxmax(), gain.idxmin()
    return (
        f"against equal weights {kind} {best} gained most ({percent(gain[best])}), {worst} least "
        f"({percent(gain[worst])})"
    )


def percent(value: float) -> str:
    """
    >>> percent(-0.3), percent(-12.0)
    ('+0 %', '−12 %')
    """
    return with_minus(f"{round(value):+d} %")


def with_minus(number: str) -> str:
    """A number with a minus sign in place of the hyphen that Python writes.

    >>> with_minus("-0.50")
    '−0.50'
    """
    return number.replace("-", "−")


def _describe_agreement(last: pd.DataFrame) -> str:
    if len(last.columns) < 2:
        return "this is one training, another one may differ"
    correlation = agreement(last)
    if np.isnan(correlation):
        return "one training has equal weights, so there is no agreement to speak of"
    verdict = "agree on it" if correlation >= AGREEING else "do not agree on it, so take it for chance"
    return f"the {len(last.columns)} trainings {verdict} (mean correlation {with_minus(f'{correlation:.2f}')})"


def list_weights(groups: Sequence[Group]) -> pd.DataFrame:
    """A row for each group, fold, epoch and map.

    Columns: ``group``, ``fold``, ``epoch``, ``map``, ``operator``, ``scales``, ``weight``, ``share`` (of all weight),
    ``relative`` (to equal weights).
    """
    parts = [
        _list_fold(history, group.maps).assign(group=group.name, fold=fold)
        for group in groups
        for fold, history in group.histories.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    first = ["group", "fold"]
    return table[first + [name for name in table if name not in first]]


def _list_fold(history: pd.DataFrame, maps: Sequence[Map]) -> pd.DataFrame:
    """The rows of one fold, without the columns that name it."""
    names = [m.name for m in maps]
    share = share_of_each(history)
    values = {"weight": history, "share": share, "relative": share * len(maps)}
    columns = {
        "epoch": np.repeat(np.arange(len(history)), len(maps)),
        "map": np.tile(names, len(history)),
        "operator": np.tile([m.operator for m in maps], len(history)),
        "scales": np.tile([m.subset for m in maps], len(history)),
        **{name: table[names].to_numpy().ravel() for name, table in values.items()},
    }
    return pd.DataFrame(columns)
