"""What LoMix has learned: which scales and operators mattered, and whether folds agree."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import click
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from nnunet_lomix.files import replacing
from nnunet_lomix.history import TABLE, draw_evolution
from nnunet_lomix.maps import ORIGINAL, Map

PICTURE = "weights.png"
TIDY = "weights.csv"
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
NOTABLE = 0.1  # weights within 10 % of equal ones have told nothing apart
AGREEING = 0.5  # correlation between folds from which a ranking of the maps is theirs, not chance
EXPLANATION = (
    "All without z_0, whose share is guaranteed. A map's weight is split evenly over the scales in its subset; 'equal' "
    "is the share if all maps had the same weight. A weight says how a loss was weighted, not what a map is good for."
)


class WeightsError(click.ClickException):
    """Why there are no weights to show, in one sentence."""


def show_weights(folders: Sequence[str | Path], out: str | Path, console: Console | None = None):
    """Print what was learned, and write ``weights.png`` and ``weights.csv``.

    Args:
        folders: of trainers, for all of their folds, or of folds.
        out: where to write; made if it isn't there.
        console: where to print.

    Raises:
        click.ClickException: a folder has no weights, a file can't be trusted, or folds have different maps.
    """
    console = console or Console()
    found = find_folds(folders)
    begun = {name: fold for name, fold in found.items() if has_history(fold)} or found
    histories = {name: read_history(fold) for name, fold in begun.items()}
    maps = common_maps(histories)
    last = last_weights(histories)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / TIDY) as temporary:
            tidy(histories, maps).to_csv(temporary, index=False, float_format="%.6g")
        plot(histories, maps, out / PICTURE)
    except OSError as error:
        raise WeightsError(f"{out} can't be written: {error.strerror}.") from None
    console.print(Text(summarise(last, maps), style="bold"), "", sep="\n")
    if len(begun) < len(found):
        console.print(Text(f"Without {', '.join(found.keys() - begun)}: LoMix has not ended an epoch there.\n"))
    console.print(_fold_table(histories, last), "")
    for kind, belongs in (("scale", by_scale(maps)), ("operator", by_operator(maps))):
        console.print(_share_table(kind, shares(last, belongs)), "")
    console.print(Text(EXPLANATION))
    console.print(f"Every map and epoch: {out / PICTURE}, {out / TIDY}", soft_wrap=True, markup=False)


def find_folds(folders: Sequence[str | Path]) -> dict[str, Path]:
    """The fold folders, by names as short as they can be.

    Raises:
        WeightsError: a folder is neither a trainer's nor a fold's.
    """
    found = []
    for folder in map(Path, folders):
        folder = folder.resolve()
        folds = [folder] if folder.name.startswith("fold_") else sorted(folder.glob("fold_*/"))
        if not folds:
            raise WeightsError(f"{folder} has no fold_X in it: name the folder of a trainer, or of a fold.")
        found += folds
    found = list(dict.fromkeys(found))
    choices = (
        [fold.name for fold in found],
        [f"{fold.parent.name.split('__')[0]}/{fold.name}" for fold in found],
        [f"{fold.parent.name}/{fold.name}" for fold in found],
        [str(fold) for fold in found],
    )
    names = next(names for names in choices if len(set(names)) == len(found))
    return dict(zip(names, found, strict=True))


def has_history(fold: Path) -> bool:
    """Whether LoMix, or another trainer, has ended an epoch there."""
    return any((fold / name).is_file() for name in (TABLE, *CHECKPOINTS))


def read_history(fold: Path) -> pd.DataFrame:
    """The weights of a fold: a row for each epoch, a column for each map; NaN for epochs without LoMix.

    From ``lomix_weights.csv``, which is written after every epoch, or else from a checkpoint.

    Raises:
        click.ClickException: there are none, or the file isn't right.
    """
    if (fold / TABLE).is_file():
        return _check(_read_table(fold / TABLE), fold / TABLE)
    for file in (fold / name for name in CHECKPOINTS):
        if file.is_file():
            from nnunet_lomix.checkpoints import STATE, read_checkpoint  # torch is slow to import

            state = read_checkpoint(file).get(STATE)
            if state is None:
                raise WeightsError(f"{file} has no LoMix state: it was not written by a trainer of nnunet_lomix.")
            return _check(pd.DataFrame(state["history"]), file)
    raise WeightsError(f"{fold} has neither {TABLE} nor a checkpoint: LoMix has not ended an epoch there.")


def _read_table(file: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(file, index_col="epoch")
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} can't be read: {str(error).splitlines()[0]}.") from None


def _check(history: pd.DataFrame, file: Path) -> pd.DataFrame:
    numeric = all(pd.api.types.is_numeric_dtype(kind) for kind in history.dtypes)
    named = all((m := _parse(name)) is not None and m.name == name for name in history.columns)
    if not numeric or not named or "z_0" not in history or len(history.columns) < 2:
        raise WeightsError(f"{file} is not a table of LoMix weights, a column for each map, z_0 among them.")
    if not len(history) or not np.isfinite(history.iloc[-1]).all() or (history.iloc[-1] < 0).any():
        raise WeightsError(f"{file} has no weights for its last epoch.")
    if not history.iloc[-1].drop("z_0").sum():
        raise WeightsError(f"In {file} all weight is z_0's: there is nothing to compare.")
    return history


def _parse(name: str) -> Map | None:
    """The map of a name such as ``add_0_2``; the inverse of :attr:`Map.name`."""
    parts = re.fullmatch(r"([^\W\d]\w*?)((?:_\d+)+)", name)
    if parts is None:
        return None
    scales = tuple(map(int, parts[2][1:].split("_")))
    return Map(ORIGINAL if parts[1] == "z" else parts[1], scales)


def common_maps(histories: Mapping[str, pd.DataFrame]) -> list[Map]:
    """The maps of all folds.

    Raises:
        WeightsError: they aren't the same.
    """
    (first, history), *others = histories.items()
    for name, other in others:
        if set(other.columns) != set(history.columns):
            raise WeightsError(f"{first} and {name} have different maps: show them one by one.")
    return [_parse(name) for name in history.columns]


def last_weights(histories: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Share of each map in the weight after the last epoch: a row for each map, a column for each fold."""
    last = pd.DataFrame({name: history.iloc[-1] for name, history in histories.items()})
    return last.loc[next(iter(histories.values())).columns] / last.sum()


def relative_weights(last: pd.DataFrame) -> pd.DataFrame:
    """Weight of each map but z_0, as a multiple of what it would be if these were equal."""
    others = last.drop("z_0")
    return others / others.mean()


def by_scale(maps: Sequence[Map]) -> pd.DataFrame:
    """How each map's weight (row) is split over the scales (columns): evenly over those of its subset."""
    scales = sorted({s for m in maps for s in m.scales})
    return pd.DataFrame(
        [[(s in m.scales) / len(m.scales) for s in scales] for m in maps],
        index=[m.name for m in maps],
        columns=list(map(str, scales)),
    )


def by_operator(maps: Sequence[Map]) -> pd.DataFrame:
    """Whose each map's weight (row) is among the operators (columns)."""
    operators = list(dict.fromkeys(m.operator for m in maps))
    rows = [[float(m.operator == operator) for operator in operators] for m in maps]
    return pd.DataFrame(rows, index=[m.name for m in maps], columns=operators)


def shares(last: pd.DataFrame, belongs: pd.DataFrame) -> pd.DataFrame:
    """Share of each scale or operator in the weight that z_0 doesn't have.

    Args:
        last: as from :func:`last_weights`.
        belongs: as from :func:`by_scale` or :func:`by_operator`.

    Returns:
        A row for each scale or operator; columns ``equal``, what equal weights would give, ``mean`` over folds, and
        ``low`` and ``high``, the folds' extremes.
    """
    belongs = belongs.drop("z_0")
    folds = belongs.T @ (relative_weights(last) / len(belongs))
    table = pd.DataFrame(
        {"equal": belongs.mean(), "mean": folds.mean(axis=1), "low": folds.min(axis=1), "high": folds.max(axis=1)}
    )
    return table[table["equal"] > 0]


def agreement(last: pd.DataFrame) -> float:
    """Mean of Spearman's correlation over all pairs of folds, without z_0; NaN if there is none."""
    ranks = last.drop("z_0").rank()
    with np.errstate(invalid="ignore", divide="ignore"):  # equal weights have no ranking
        return float(np.mean([ranks[a].corr(ranks[b]) for a, b in combinations(ranks, 2)] or [np.nan]))


def summarise(last: pd.DataFrame, maps: Sequence[Map]) -> str:
    """What mattered, in one sentence that the numbers allow."""
    by_fold = relative_weights(last)
    relative = by_fold.mean(axis=1)
    in_any, in_mean = (100 * (part - 1).abs().to_numpy().max() for part in (by_fold, relative))
    if in_any < 100 * NOTABLE:
        return (
            "Neither scales nor operators were told apart: z_0 aside, no map differs from equal weights by more than "
            f"{in_any:.1f} %."
        )
    if in_mean < 100 * NOTABLE:  # what one training raised another one lowered
        return (
            f"Single trainings differ from equal weights by up to {in_any:.0f} %, but their mean by no more than "
            f"{in_mean:.1f} %; {_agreement_text(last)}."
        )
    parts = [
        _extremes("scale", shares(last, by_scale(maps))),
        _extremes("operator", shares(last, by_operator(maps))),
        f"the heaviest map, {relative.idxmax()}, has {relative.max():.2f} times an equal weight, "
        f"the lightest, {relative.idxmin()}, {relative.min():.2f} times",
        _agreement_text(last),
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
        f"against equal weights {kind} {best} gained most ({_percent(gain[best])}), {worst} least "
        f"({_percent(gain[worst])})"
    )


def _percent(value: float) -> str:
    """
    >>> _percent(-0.3), _percent(-12.0)
    ('+0 %', '−12 %')
    """
    return f"{round(value):+d} %".replace("-", "−")


def _agreement_text(last: pd.DataFrame) -> str:
    if len(last.columns) < 2:
        return "this is one training, another one may differ"
    correlation = agreement(last)
    if np.isnan(correlation):
        return "one training has equal weights, so there is no agreement to speak of"
    verdict = "agree on it" if correlation >= AGREEING else "do not agree on it, so take it for chance"
    return f"the {len(last.columns)} trainings {verdict} (mean correlation {correlation:.2f})"


def tidy(histories: Mapping[str, pd.DataFrame], maps: Sequence[Map]) -> pd.DataFrame:
    """A row for each fold, epoch and map.

    Columns: ``fold``, ``epoch``, ``map``, ``operator``, ``scales``, ``weight``, ``share`` (of all weight), ``relative``
    (to equal weights of all maps but z_0, which has none).
    """
    parts = []
    for fold, history in histories.items():
        others = history.drop(columns="z_0")
        tables = {
            "weight": history,
            "share": history.div(history.sum(axis=1, min_count=1), axis=0),
            "relative": others.div(others.mean(axis=1), axis=0).reindex(columns=history.columns),
        }
        columns = {name: table[[m.name for m in maps]].to_numpy().ravel() for name, table in tables.items()}
        index = pd.MultiIndex.from_product([[fold], range(len(history)), [m.name for m in maps]])
        part = pd.DataFrame(columns, index=index.set_names(["fold", "epoch", "map"])).reset_index()
        part.insert(3, "operator", [m.operator for m in maps] * len(history))
        part.insert(4, "scales", [m.subset for m in maps] * len(history))
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _fold_table(histories: Mapping[str, pd.DataFrame], last: pd.DataFrame) -> Table:
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
        ends = [
            f"{name} ({relative.loc[name, fold]:.2f})" for name in (relative[fold].idxmax(), relative[fold].idxmin())
        ]
        table.add_row(fold, str(len(history)), f"{100 * last.loc['z_0', fold]:.1f}", *ends)
    if len(last.columns) > 1:
        spread = 100 * relative.std(axis=1)
        table.caption = (
            f"Agreement: mean Spearman correlation of two folds {agreement(last):.2f}; between folds the weight of a "
            f"map varies by {spread.mean():.0f} % of an equal one (standard deviation, mean over maps; "
            f"{spread.idxmax()} most, {spread.max():.0f} %)."
        )
        table.caption_justify = "left"
    return table


def _share_table(kind: str, part: pd.DataFrame) -> Table:
    table = Table(kind, box=box.SIMPLE_HEAD, show_edge=False)
    several = bool((part["low"] < part["high"]).any())
    for name in ("share, %", *["folds"] * several, "equal, %", "difference"):
        table.add_column(name, justify="right")
    for row in (100 * part).itertuples():
        between = [f"{row.low:.1f} to {row.high:.1f}"] * several
        cells = [f"{row.mean:.1f}", *between, f"{row.equal:.1f}", _percent(100 * (row.mean / row.equal - 1))]
        table.add_row(str(row.Index), *cells)
    return table


def plot(histories: Mapping[str, pd.DataFrame], maps: Sequence[Map], path: Path):
    """Draw all maps as a heat map, scales, operators, the folds side by side, and the weights over epochs."""
    last = last_weights(histories)
    relative = relative_weights(last)
    # nnU-Net's own plots change matplotlib's global settings
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        subsets = len({m.subset for m in maps})
        figure = Figure(figsize=(max(9, 3 + 0.7 * subsets, 2 + 0.3 * len(maps)), 15), layout="constrained")
        axes = figure.subplot_mosaic("HH;SO;FF;EE", height_ratios=(4, 3, 4, 4.5))
        _draw_heat_map(axes["H"], relative.mean(axis=1), last.loc["z_0"].mean(), maps)
        _draw_shares(axes["S"], shares(last, by_scale(maps)), "scale, 0 is the finest")
        _draw_shares(axes["O"], shares(last, by_operator(maps)), "operator")
        _draw_folds(axes["F"], relative)
        mean = pd.concat([h.div(h.sum(axis=1, min_count=1), axis=0) for h in histories.values()], keys=histories)
        history = mean.groupby(level=1).mean().to_dict("records")
        draw_evolution(axes["E"], history, maps)
        axes["E"].set_title("Share of each map over the training, in %, mean of the folds that got as far", loc="left")
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)


def _draw_heat_map(ax: Axes, relative: pd.Series, first: float, maps: Sequence[Map]):
    operators = list(dict.fromkeys(m.operator for m in maps))
    subsets = list(dict.fromkeys(m.subset for m in maps))
    table = np.full((len(operators), len(subsets)), np.nan)
    for m in maps:
        if m.name != "z_0":
            table[operators.index(m.operator), subsets.index(m.subset)] = 100 * (relative[m.name] - 1)
    ax.set_facecolor("#e4e4e4")  # no such map, unlike white, equal weight
    # small differences stay pale
    top = max(25, np.nanmax(np.abs(table)))
    ax.imshow(table, cmap="RdBu_r", norm=TwoSlopeNorm(0, -top, top), aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            colour = "white" if abs(value) > 0.6 * top else "black"
            ax.text(column, row, f"{value:+.0f}", ha="center", va="center", color=colour, fontsize=9)
    position = subsets.index("0"), operators.index(ORIGINAL)
    ax.text(*position, f"{100 * first:.0f} %\nof all", ha="center", va="center", color="#555555", fontsize=8)
    ax.set_yticks(range(len(operators)), operators)
    ax.set_xticks(range(len(subsets)), subsets, rotation=0 if len(subsets) < 12 else 45)
    ax.set_xlabel("scales, 0 is the finest")
    ax.set_title("Weight of each map against equal weights, in %, mean over folds (z_0: its share)", loc="left")


def _draw_shares(ax: Axes, part: pd.DataFrame, kind: str):
    part = 100 * part
    positions = np.arange(len(part))
    several = bool((part["low"] < part["high"]).any())
    error = [part["mean"] - part["low"], part["high"] - part["mean"]] if several else None
    ax.bar(positions, part["mean"], yerr=error, capsize=4, color="#7fa8d1", ecolor="#33475b", width=0.6)
    ax.hlines(part["equal"], positions - 0.4, positions + 0.4, color="black", lw=1.5, ls="--", label="equal weights")
    ax.set_xticks(positions, part.index)
    ax.set_ylim(0, 1.25 * max(part["high"].max(), part["equal"].max()))
    ax.set_xlabel(kind)
    ax.legend(loc="upper right", frameon=False)
    ax.set_title(f"Share without z_0, in %{' (thin lines: range over folds)' * several}", loc="left")


def _draw_folds(ax: Axes, relative: pd.DataFrame):
    order = relative.mean(axis=1).sort_values(ascending=False).index
    for fold, marker in zip(relative, "os^Dv" * len(relative.columns), strict=False):
        ax.plot(range(len(order)), relative.loc[order, fold], marker, ms=5, alpha=0.7, label=fold)
    ax.plot(range(len(order)), relative.loc[order].mean(axis=1), color="black", lw=1, label="mean")
    ax.axhline(1, color="black", lw=1, ls="--", label="equal weights")
    ax.set_xticks(range(len(order)), order, rotation=90)
    ax.set_ylim(bottom=0)
    ax.margins(x=0.02)
    ax.legend(loc="lower left", frameon=False, fontsize=8, ncols=2)  # sorted: nothing is below the heaviest
    ax.set_title("Each fold: weight as a multiple of equal weights", loc="left")
