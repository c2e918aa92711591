"""Short seeded trainings of several trainers by ``nnUNetv2_train``, and the table of their Dice.

    python benchmarks/short_training.py -d 4 -c 2d --trainers nnUNetTrainer nnUNetTrainerLoMix --seeds 0 1 2

needs nnU-Net's three environment variables and the preprocessed dataset. Finished trainings are not repeated. The
pseudo Dice is nnU-Net's own, of the finest output, on random patches of the validation cases; it is the mean over
classes of the last of 10 evaluations. The validation Dice is that of nnU-Net's validation on whole volumes (2D only).
"""

import argparse
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from math import nan
from pathlib import Path
from statistics import mean

import torch
from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

TRAINERS_FOLDER = Path(__file__).parent / "short_trainers"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", type=int, default=4, help="dataset")
    parser.add_argument("-c", default="2d", help="configuration")
    parser.add_argument("--trainers", nargs="+", default=["nnUNetTrainer", "nnUNetTrainerLoMix"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one core each")
    args = parser.parse_args()
    runs = [(f"{t}_short_seed{s}", args.d, args.c) for s in args.seeds for t in args.trainers]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(runs, pool.map(lambda run: train(*run), runs), strict=True))

    print(f"\nDataset {args.d}, {args.c}, fold 0\n")
    print("| trainer | pseudo Dice by seed | mean | validation Dice by seed | mean |")
    print("|---|---|---|---|---|")
    for t in args.trainers:
        pseudo, validation = zip(*(results[f"{t}_short_seed{s}", args.d, args.c] for s in args.seeds), strict=True)
        columns = [text for values in (pseudo, validation) for text in (listed(values), f"**{mean(values):.3f}**")]
        print("|", " | ".join([t, *columns]), "|")


def train(trainer: str, dataset: int, configuration: str) -> tuple[float, float]:
    """Last pseudo Dice and validation Dice of a training, which is run if it isn't there."""
    name = maybe_convert_to_dataset_name(dataset)
    fold = Path(nnUNet_results) / name / f"{trainer}__nnUNetPlans__{configuration}" / "fold_0"
    if not (fold / "checkpoint_final.pth").is_file():
        folders = [str(TRAINERS_FOLDER), os.environ.get("nnUNet_extTrainer", "")]
        environment = os.environ | {
            "nnUNet_extTrainer": os.pathsep.join(folders),
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = ["nnUNetv2_train", str(dataset), configuration, "0", "-tr", trainer, "-device", "cpu"]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    log = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)["logging"]
    summary = fold / "validation" / "summary.json"
    validation = json.loads(summary.read_text())["foreground_mean"]["Dice"] if summary.is_file() else nan
    return float(log["mean_fg_dice"][-1]), validation


def listed(values) -> str:
    return ", ".join(f"{v:.3f}" for v in values)


if __name__ == "__main__":
    main()
