"""Short seeded trainings of several trainers by ``nnUNetv2_train``, and the table of their Dice.

    python benchmarks/short_training.py -d 4 -c 2d --trainers nnUNetTrainer nnUNetTrainerLoMix --seeds 0 1 2

needs nnU-Net's three environment variables and the preprocessed dataset. Finished trainings are not repeated. The
pseudo Dice is nnU-Net's own, of the finest output, on random patches of the validation cases; it is the mean over
classes of the last of 10 evaluations. The validation Dice is that of nnU-Net's validation on whole volumes (2D only).
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import nan
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pandas as pd

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.commands import run_command, trainers_first
from nnunet_lomix.nnunet.curves import read_curves
from nnunet_lomix.nnunet.datasets import name_dataset, require_root
from nnunet_lomix.nnunet.results import SUMMARY, FoldFolder, ModelFolder, read_json

TRAINERS_FOLDER = Path(__file__).parent / "short_trainers"
PLANS = "nnUNetPlans"


class Dice(NamedTuple):
    """0 to 1, means over classes; ``validation`` is NaN where nothing was validated."""

    pseudo: float
    validation: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", default="4", help="dataset")
    parser.add_argument("-c", default="2d", help="configuration")
    parser.add_argument("--trainers", nargs="+", default=["nnUNetTrainer", "nnUNetTrainerLoMix"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one core each")
    args = parser.parse_args()
    results, dataset = require_root("nnUNet_results"), name_dataset(args.d)
    runs = [(trainer, seed) for seed in args.seeds for trainer in args.trainers]
    with ThreadPoolExecutor(args.jobs) as pool:
        folds = dict(zip(runs, pool.map(lambda run: train(results, dataset, args.c, *run), runs), strict=True))
    table = pd.DataFrame([row(t, [read_dice(folds[t, seed]) for seed in args.seeds]) for t in args.trainers])
    print(f"\n{dataset}, {args.c}, fold 0\n")
    print(table.to_markdown(index=False, disable_numparse=True))


def row(trainer: str, by_seed: Sequence[Dice]) -> dict[str, str]:
    """A row of the table."""
    columns = {"pseudo Dice": [d.pseudo for d in by_seed], "validation Dice": [d.validation for d in by_seed]}
    result = {"trainer": trainer}
    for name, values in columns.items():
        result[f"{name} by seed"] = ", ".join(f"{v:.3f}" for v in values)
        result[f"mean {name}"] = f"**{mean(values):.3f}**"
    return result


def train(results: Path, dataset: str, configuration: str, trainer: str, seed: int) -> FoldFolder:
    """The folder of a training, which is run if it isn't there."""
    name = f"{trainer}_short_seed{seed}"
    fold = ModelFolder.of(results, dataset, name, PLANS, configuration).fold(0)
    if not fold.is_finished():
        fold.path.mkdir(parents=True, exist_ok=True)
        run_command(
            ["nnUNetv2_train", dataset, configuration, fold.fold, "-tr", name, "-p", PLANS, "-device", "cpu"],
            fold.path / "stdout.log",
            {
                **trainers_first(TRAINERS_FOLDER),
                "nnUNet_n_proc_DA": "0",
                "nnUNet_def_n_proc": "1",
                "OMP_NUM_THREADS": "1",
            },
        )
    return fold


def read_dice(fold: FoldFolder) -> Dice:
    """The last pseudo Dice of a finished training, and its validation Dice."""
    summary = fold.path / SUMMARY
    validation = read_json(summary, "foreground_mean")["foreground_mean"]["Dice"] if summary.is_file() else nan
    return Dice(read_curves(fold)["pseudo_dice"].iloc[-1], validation)


if __name__ == "__main__":
    try:
        main()
    except LoMixError as error:
        raise SystemExit(str(error)) from None
