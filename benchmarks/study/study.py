"""The study: arms × data sets × training sizes × seeds, each by nnU-Net's own training and validation of whole volumes.

    python benchmarks/study/study.py --data FOLDER --out FOLDER

takes every ``Dataset*`` in FOLDER and a generated one, plans and preprocesses them by nnU-Net, trains all arms with the
same budget and writes ``dice.csv`` (a row for each case and class of a training), ``curves.csv`` (a row for each
epoch), ``weights.csv`` (a row for each map) and the table ``table.md``. Finished trainings are not repeated; a folder
with those three CSV files is enough to go on.

A run trains the configuration ``2d_study``: nnU-Net's 2d plan with half of the channels, smaller batches, patches of 96
pixels at most, large images at twice the spacing, by AdamW or by SGD (see study_trainers/arms.py). The size ``full`` is
fold 0; ``scarce`` is the same fold with 5 % of its training cases, others for each seed.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import click
import numpy as np
import pandas as pd
import torch
from planted import write_planted
from report import write_report
from rich.progress import track

TRAINERS_FOLDER = Path(__file__).parent / "study_trainers"
sys.path.append(str(TRAINERS_FOLDER))

from arms import ARMS, OPTIMISERS  # noqa: E402

SIZES = ("full", "scarce")
SCARCE_FRACTION = 0.05
EPOCHS = 10
MOST_SEEDS = 10  # as many scarce folds follow those of the dataset
SLIMMING = 2
PIXELS = 16 * 56 * 40  # of a batch
MAX_PATCH = 96
COARSE_ABOVE = 128  # pixels of a planned patch; a larger one gets twice the spacing
TABLES = ("curves", "weights", "dice")  # dice last: a run that is in it is finished
KEY = ["dataset", "size", "arm", "seed", "steps", "optimiser"]


@dataclass(frozen=True)
class Run:
    dataset: str
    size: str
    arm: str
    seed: int
    steps: int
    optimiser: str


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n"))
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="raw nnU-Net datasets")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="study", show_default=True)
@click.option("--datasets", default="", help="their names, separated by commas; default all")
@click.option("--arms", default="nnUNetTrainer,barrier", show_default=True, help="separated by commas")
@click.option("--sizes", default="full,scarce", show_default=True, help="separated by commas")
@click.option("--seeds", default="0,1,2", show_default=True, help="separated by commas")
@click.option("--steps", default=600, show_default=True, help="training steps of a run")
@click.option("--optimiser", type=click.Choice(list(OPTIMISERS)), default="adamw", show_default=True)
@click.option("--jobs", default=2, show_default=True, help="runs side by side, one core each on a CPU")
@click.option("--device", default="cpu", show_default=True)
def main(data, out, datasets, arms, sizes, seeds, steps, optimiser, jobs, device):
    if not all(seed.isdecimal() and int(seed) < MOST_SEEDS for seed in seeds.split(",")):
        raise click.UsageError(f"--seeds takes numbers below {MOST_SEEDS}, separated by commas, got {seeds!r}.")
    study = Study(out.absolute(), device)
    folders = raw_datasets(data, study.raw)
    check_names("--datasets", datasets, folders)
    check_names("--sizes", sizes, SIZES)
    check_names("--arms", arms, ARMS)
    prepared = [
        study.prepare(f) for name, f in folders.items() if name in (datasets.split(",") if datasets else folders)
    ]
    runs = [
        Run(dataset, size, arm, int(seed), steps, optimiser)
        for seed in seeds.split(",")
        for dataset in prepared
        for size in sizes.split(",")
        for arm in arms.split(",")
    ]
    missing = [run for run in runs if not study.is_finished(run)]
    with ThreadPoolExecutor(jobs) as pool:
        for _ in track(pool.map(study.train, missing), f"{len(missing)} runs", len(missing)):
            pass
    write_report(out)


def check_names(option: str, given: str, known):
    unknown = set(given.split(",")) - set(known) - {""}
    if unknown:
        raise click.UsageError(f"{option}: unknown {', '.join(sorted(unknown))}; choose from {', '.join(known)}.")


def raw_datasets(data: Path | None, raw: Path) -> dict[str, Path]:
    """The folders of the datasets by name; the planted one is generated."""
    folders = sorted(data.glob("Dataset*")) if data else []
    planted = raw / "Dataset900_Planted"
    if not planted.is_dir():
        write_planted(planted)
    return {folder.name: folder for folder in [*folders, planted]}


class Study:
    """A folder with the study's datasets, trainings and tables."""

    def __init__(self, out: Path, device: str):
        self.out = out
        self.device = device
        self.raw, self.preprocessed, self.results = (out / part for part in ("raw", "preprocessed", "results"))
        for folder in (self.raw, self.preprocessed, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        self.writing = Lock()

    def run(self, command: list, log: Path, **variables: str):
        folders = [str(TRAINERS_FOLDER), os.environ.get("nnUNet_extTrainer", "")]
        environment = os.environ | {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_extTrainer": os.pathsep.join(f for f in folders if f),
            "nnUNet_def_n_proc": "1",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        with log.open("w") as file:
            failed = subprocess.run(list(map(str, command)), env=environment, stdout=file, stderr=file).returncode
        if failed:
            raise click.ClickException(f"{command[0]} failed; see {log}")

    def prepare(self, folder: Path) -> str:
        """Plan and preprocess a dataset, add the configuration and the scarce folds of the study; gives its name."""
        name = folder.name
        target = self.preprocessed / name
        plans_file, splits_file = target / "nnUNetPlans.json", target / "splits_final.json"
        if splits_file.is_file():
            return name
        if not (self.raw / name).exists():
            (self.raw / name).symlink_to(folder.absolute())
        options = ["-d", name[7:10], "-npfp", "2", "--clean", "--no_pp"]
        log, results = self.out / f"plan_{name}.log", str(self.results)
        self.run(["nnUNetv2_plan_and_preprocess", *options], log, nnUNet_results=results)
        plans = json.loads(plans_file.read_text())
        plans["configurations"]["2d_study"] = study_configuration(plans["configurations"]["2d"])
        plans_file.write_text(json.dumps(plans, indent=4))
        options = ["-d", name[7:10], "-c", "2d_study", "-np", "2"]
        self.run(["nnUNetv2_preprocess", *options], log.with_stem(f"preprocess_{name}"), nnUNet_results=results)
        if (folder / "splits_final.json").is_file():
            splits = json.loads((folder / "splits_final.json").read_text())
        else:
            cases = sorted(f.name.split(".")[0] for f in (folder / "labelsTr").iterdir())
            order = np.random.default_rng(0).permutation(cases).tolist()
            splits = [{"train": sorted(order[len(order) // 5 :]), "val": sorted(order[: len(order) // 5])}]
        splits_file.write_text(json.dumps([*splits, *scarce_folds(splits[0])], indent=4))
        return name

    def fold(self, run: Run) -> int:
        folds = len(json.loads((self.preprocessed / run.dataset / "splits_final.json").read_text()))
        return 0 if run.size == "full" else folds - MOST_SEEDS + run.seed

    def folder(self, run: Run) -> Path:
        results = self.results / f"seed_{run.seed}_{run.steps}_steps_{run.optimiser}"
        return results / run.dataset / f"Study{run.arm}__nnUNetPlans__2d_study" / f"fold_{self.fold(run)}"

    def is_finished(self, run: Run) -> bool:
        file = self.out / "dice.csv"
        return file.is_file() and (pd.read_csv(file)[KEY] == pd.Series(vars(run))[KEY]).all(axis=1).any()

    def train(self, run: Run):
        """Train and validate; then the run's rows are added to the tables, and what nobody needs is deleted."""
        folder = self.folder(run)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        budget = {
            "seed": run.seed,
            "epochs": EPOCHS,
            "iterations": run.steps // EPOCHS,
            "optimiser": run.optimiser,
        }
        command = ["nnUNetv2_train", run.dataset[7:10], "2d_study", self.fold(run), "-tr", f"Study{run.arm}"]
        self.run(
            [*command, "-device", self.device],
            folder / "stdout.log",
            nnUNet_results=str(folder.parents[2]),
            nnUNet_n_proc_DA="0",  # the same batches for every arm
            NNUNET_LOMIX_STUDY=json.dumps(budget),
        )
        tables = dict(zip(TABLES, read_run(folder), strict=True))
        with self.writing:
            for name, rows in tables.items():
                rows = rows.assign(**vars(run))[[*KEY, *rows.columns]]
                file = self.out / f"{name}.csv"
                rows.to_csv(file, mode="a", index=False, header=not file.exists(), float_format="%.5g")
        for file in [*folder.glob("checkpoint*"), *folder.glob("validation/*.nii.gz")]:
            file.unlink()


def study_configuration(planned: dict) -> dict:
    """nnU-Net's configuration with fewer channels and smaller patches and batches, of the same kind otherwise."""
    architecture = json.loads(json.dumps(planned["architecture"]))
    kwargs = architecture["arch_kwargs"]
    coarser = 2 if max(planned["patch_size"]) > COARSE_ABOVE else 1
    patch = [min(p // coarser, MAX_PATCH) for p in planned["patch_size"]]
    strides = np.cumprod(kwargs["strides"], axis=0)
    stages = max(
        i + 1 for i, s in enumerate(strides) if all(p % n == 0 and p // n >= 5 for p, n in zip(patch, s, strict=True))
    )
    for key in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
        kwargs[key] = kwargs[key][:stages]
    kwargs["n_stages"] = stages
    kwargs["n_conv_per_stage_decoder"] = kwargs["n_conv_per_stage_decoder"][: stages - 1]
    kwargs["features_per_stage"] = [n // SLIMMING for n in kwargs["features_per_stage"]]
    batch_size = max(2, PIXELS // int(np.prod(patch)))
    return {
        "inherits_from": "2d",
        "data_identifier": "nnUNetPlans_2d_study",
        "spacing": [coarser * s for s in planned["spacing"]],
        "patch_size": patch,
        "batch_size": batch_size,
        "architecture": architecture,
    }


def scarce_folds(fold: dict) -> list[dict]:
    """A fold with a random part of its training cases, for each seed another."""
    train = sorted(fold["train"])
    size = max(2, round(SCARCE_FRACTION * len(train)))
    draws = [np.random.default_rng(seed).choice(train, size, replace=False) for seed in range(MOST_SEEDS)]
    return [{"train": sorted(draw.tolist()), "val": fold["val"]} for draw in draws]


def read_run(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The epochs, the weights at the end of a training, and the Dice of each case and class."""
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    dice = pd.DataFrame(
        [
            # nnU-Net gives NaN where neither reference nor prediction has the class: there they agree
            {
                "case": Path(case["prediction_file"]).name.split(".")[0],
                "class": c,
                "dice": np.nan_to_num(m["Dice"], nan=1.0),
            }
            for case in summary["metric_per_case"]
            for c, m in case["metrics"].items()
        ]
    )
    log = torch.load(folder / "checkpoint_final.pth", map_location="cpu", weights_only=False)["logging"]
    seconds = np.subtract(log["epoch_end_timestamps"], log["epoch_start_timestamps"])
    curves = pd.DataFrame(
        {
            "epoch": range(len(seconds)),
            "seconds": seconds,
            "train_loss": np.asarray(log["train_losses"], float),
            "pseudo_dice": np.asarray(log["mean_fg_dice"], float),
        }
    )
    history = folder / "lomix_weights.csv"
    last = pd.read_csv(history).drop(columns="epoch").iloc[-1] if history.is_file() else pd.Series(dtype=float)
    return curves, pd.DataFrame({"map": last.index, "weight": last.to_numpy()}), dice


if __name__ == "__main__":
    main()
