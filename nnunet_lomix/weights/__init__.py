"""What LoMix has learned: which scales and operators mattered, and whether folds agree."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.files import replacing
from nnunet_lomix.nnunet.results import FoldFolder
from nnunet_lomix.weights.pictures import plot_groups
from nnunet_lomix.weights.read import NoWeights, common_maps, find_groups, read_history, warn_of_unknown_splits
from nnunet_lomix.weights.summary import Group, list_weights, operator_membership, scale_membership, shares, summarise
from nnunet_lomix.weights.tables import make_fold_table, make_share_table

__all__ = ["show_weights"]

OVERVIEW_PICTURE = "weights.png"
OVERVIEW_TABLE = "weights.csv"
EXPLANATION = (
    "A map's weight is split evenly over the scales in its subset; 'equal' is the share if all maps had the same "
    "weight, and behind each share stand its range over folds and how much more or less it is than the equal one. A "
    "weight says how a loss was weighted, not what a map is good for."
)


def show_weights(folders: Sequence[str | Path], out: str | Path, console: Console | None = None) -> None:
    """Print what was learned, and write ``weights.png`` and ``weights.csv``.

    Args:
        folders: of models, for all of their folds, or of folds. Each model has a column of its own, and so have its
            folds with few training cases.
        out: where to write; made if it isn't there.
        console: where to print.

    Raises:
        LoMixError: a folder has no weights, a file can't be trusted, or folds of a model have different maps.
    """
    console = console or Console()
    found = find_groups(folders)
    groups, left_out = read_groups(found)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / OVERVIEW_TABLE) as temporary:
            list_weights(groups).to_csv(temporary, index=False, float_format="%.6g")
        plot_groups(groups, out / OVERVIEW_PICTURE)
    except OSError as error:
        raise LoMixError(f"{out} can't be written: {error.strerror}.") from None
    for group in groups:
        title = f"{group.name}: " if len(found) > 1 else ""
        console.print(Text(f"{title}{summarise(group.last, group.maps)}", style="bold"), "", sep="\n")
    if left_out:
        console.print(Text(f"Without {', '.join(left_out)}: LoMix has not ended an epoch there.\n"))
    for sentence in warn_of_unknown_splits(found):
        console.print(Text(f"{sentence}\n"))
    console.print(make_fold_table(groups), "")
    for kind, membership in (("scale", scale_membership), ("operator", operator_membership)):
        parts = {group.name: shares(group.last, membership(group.maps)) for group in groups}
        console.print(make_share_table(kind, parts), "")
    console.print(Text(EXPLANATION))
    console.print(
        f"Every map and epoch: {out / OVERVIEW_PICTURE}, {out / OVERVIEW_TABLE}", soft_wrap=True, markup=False
    )


def read_groups(found: Mapping[str, Mapping[str, FoldFolder]]) -> tuple[list[Group], list[str]]:
    """The weights of each group, and the names of the folds in which LoMix has not ended an epoch.

    Args:
        found: as from :func:`~nnunet_lomix.weights.read.find_groups`.

    Raises:
        LoMixError: no fold has weights, a file can't be trusted, or folds of a group have different maps.
    """
    groups, reasons = [], {}
    for name, folds in found.items():
        histories = {}
        for fold, folder in folds.items():
            try:
                histories[fold] = read_history(folder)
            except NoWeights as error:
                reasons[f"{name}/{fold}" if len(found) > 1 else fold] = error
        if histories:
            groups.append(Group(name, histories, common_maps(histories)))
    if not groups:
        raise next(iter(reasons.values()))
    return groups, list(reasons)
