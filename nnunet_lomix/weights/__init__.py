"""What LoMix has learned: which scales and operators mattered, and whether folds agree."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.files import replacing
from nnunet_lomix.weights.pictures import plot_folds
from nnunet_lomix.weights.read import common_maps, find_folds, has_history, read_history
from nnunet_lomix.weights.summary import by_operator, by_scale, last_weights, list_weights, shares, summarise
from nnunet_lomix.weights.tables import make_fold_table, make_share_table

__all__ = ["show_weights"]

OVERVIEW_PICTURE = "weights.png"
OVERVIEW_TABLE = "weights.csv"
EXPLANATION = (
    "All without z_0, whose share is guaranteed. A map's weight is split evenly over the scales in its subset; 'equal' "
    "is the share if all maps had the same weight. A weight says how a loss was weighted, not what a map is good for."
)


def show_weights(folders: Sequence[str | Path], out: str | Path, console: Console | None = None) -> None:
    """Print what was learned, and write ``weights.png`` and ``weights.csv``.

    Args:
        folders: of trainers, for all of their folds, or of folds.
        out: where to write; made if it isn't there.
        console: where to print.

    Raises:
        LoMixError: a folder has no weights, a file can't be trusted, or folds have different maps.
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
        with replacing(out / OVERVIEW_TABLE) as temporary:
            list_weights(histories, maps).to_csv(temporary, index=False, float_format="%.6g")
        plot_folds(histories, maps, out / OVERVIEW_PICTURE)
    except OSError as error:
        raise LoMixError(f"{out} can't be written: {error.strerror}.") from None
    console.print(Text(summarise(last, maps), style="bold"), "", sep="\n")
    if len(begun) < len(found):
        left_out = ", ".join(name for name in found if name not in begun)
        console.print(Text(f"Without {left_out}: LoMix has not ended an epoch there.\n"))
    console.print(make_fold_table(histories, last), "")
    for kind, belongs in (("scale", by_scale(maps)), ("operator", by_operator(maps))):
        console.print(make_share_table(kind, shares(last, belongs)), "")
    console.print(Text(EXPLANATION))
    console.print(
        f"Every map and epoch: {out / OVERVIEW_PICTURE}, {out / OVERVIEW_TABLE}", soft_wrap=True, markup=False
    )
