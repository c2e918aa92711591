"""What LoMix has learned: which scales and operators mattered, and whether folds agree.

- ``history``: the table and the picture that a training writes, and reading the table;
- ``groups``: the folds that are shown together;
- ``summary``: their numbers, as a sentence and as tables;
- ``picture``: the one picture, of a training and of several of them.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.files import replacing
from nnunet_lomix.weights.groups import read_groups
from nnunet_lomix.weights.picture import draw_weights
from nnunet_lomix.weights.summary import list_weights, summarise, tabulate

__all__ = ["show_weights"]

EXPLANATION = (
    "Heaviest and lightest map: times an equal weight, mean over folds. Agreement: mean Spearman correlation of two "
    "folds. Scales and operators: share of all weight in % (range over folds), and how much more or less than with "
    "equal weights it is; a map's weight is split evenly over the scales in its subset. A weight says how a loss was "
    "weighted, not what a map is good for."
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
    console, out = console or Console(), Path(out)
    groups, notes = read_groups(folders)
    picture, table = out / "weights.png", out / "weights.csv"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(table) as temporary:
            list_weights(groups).to_csv(temporary, index=False, float_format="%.6g")
        draw_weights(groups, picture)
    except OSError as error:
        raise LoMixError(f"{out} can't be written: {error.strerror}.") from None
    for group in groups:
        title = f"{group.name}: " if len(groups) > 1 else ""
        console.print(Text(f"{title}{summarise(group)}\n", style="bold"))
    for sentence in notes:
        console.print(Text(f"{sentence}\n"))
    console.print(tabulate(groups), "", Text(EXPLANATION))
    console.print(f"Every map and epoch: {picture}, {table}", soft_wrap=True, markup=False)
