"""The study: arms × data sets × training sizes × seeds, each by nnU-Net's own training and validation of whole volumes.

    python benchmarks/study/study.py --data FOLDER --out FOLDER

takes every ``Dataset*`` in FOLDER and two generated ones, plans and preprocesses them with nnU-Net, and trains all
arms with the same budget. It writes four tables and report.py's summary of them: ``runs.csv`` (a row for each training
run), ``scores.csv`` (a row for each case and output that predicted it, the means over classes), ``curves.csv`` (a row
for each epoch) and ``weights.csv`` (a row for each map). Finished runs are not repeated; a folder with those four files
is enough to go on. On a GPU give ``--device cuda`` and as many ``--jobs`` as it has memory for.

A run trains the configuration ``2d_study``: nnU-Net's 2d plan with half of the channels, smaller batches, patches of 96
pixels at most, and large images at twice the spacing. The size ``full`` is fold 0; ``scarce`` is the same fold with 5 %
of its training cases, others for each seed. study_trainers/arms.py has the arms and the optimisers.
"""

import json
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import click
import numpy as np
import pandas as pd
from generated import write_datasets
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from report import write_report
from rich.progress import track

from nnunet_lomix.cli import Command
from nnunet_lomix.compare.scoring import ScoringSettings, score_case
from nnunet_lomix.errors import UsageError
from nnunet_lomix.nnunet.commands import folders_below, run_command, trainers_first
from nnunet_lomix.nnunet.curves import read_curves
from nnunet_lomix.nnunet.datasets import SPLITS, Split, list_cases, read_splits, write_splits
from nnunet_lomix.nnunet.results import FoldFolder, ModelFolder, read_dataset_json, read_json
from nnunet_lomix.nnunet.segmentations import find_reader
from nnunet_lomix.weights.history import TABLE

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
COARSE_ABOVE = 128  # pixels of a planned patch; a larger one gets twice the spacing,
THIN = ("Dataset506_DRIVE", "Dataset900_Planted")  # unless what is to be segmented would be lost
PLANS, PLANNED, TRAINED = "nnUNetPlans", "2d", "2d_study"  # names of nnU-Net's plans and configuration, and of ours
KEY = ["dataset", "size", "arm", "seed", "steps", "optimiser"]


@dataclass(frozen=True)
class Run:
    """A training run of the study; its fields are the columns KEY of runs.csv."""

    dataset: str
    size: str
    arm: str
    seed: int
    steps: int
    optimiser: str


@click.command(cls=Command, help=__doc__.replace("\n\n", "\n\n\b\n"))
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="raw nnU-Net datasets")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="study", show_default=True)
@click.option("--datasets", default="", help="their names, separated by commas; default all")
@click.option("--arms", default="nnUNetTrainer,default", show_default=True, help="separated by commas")
@click.option("--sizes", default="full,scarce", show_default=True, help="separated by commas")
@click.option("--seeds", default="0,1,2", show_default=True, help="separated by commas")
@click.option("--steps", default=3000, show_default=True, help=f"training steps of a run, a multiple of {EPOCHS}")
@click.option("--optimiser", type=click.Choice(list(OPTIMISERS)), default="nnunet", show_default=True)
@click.option("--jobs", default=2, show_default=True, help="runs side by side, one core each on a CPU")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(
    data: Path | None,
    out: Path,
    datasets: str,
    arms: str,
    sizes: str,
    seeds: str,
    steps: int,
    optimiser: str,
    jobs: int,
    device: str,
) -> None:
    if not all(seed.isdecimal() and int(seed) < MOST_SEEDS for seed in seeds.split(",")):
        raise UsageError(f"--seeds takes numbers below {MOST_SEEDS}, separated by commas, got {seeds!r}.")
    if steps < EPOCHS or steps % EPOCHS:
        raise UsageError(f"--steps takes a multiple of the {EPOCHS} epochs of a run, got {steps}.")
    study = Study(out.absolute(), device)
    folders = raw_datasets(data, study.raw)
    check_names("--datasets", datasets, folders)
    check_names("--sizes", sizes, SIZES)
    check_names("--arms", arms, ARMS)
    wanted = datasets.split(",") if datasets else folders
    prepared = [study.prepare(folder) for name, folder in folders.items() if name in wanted]
    runs = [
        Run(dataset, size, arm, int(seed), steps, optimiser)
        for seed in seeds.split(",")
        for dataset in prepared
        for size in sizes.split(",")
        for arm in arms.split(",")
    ]
    missing = [run for run in runs if not study.is_finished(run)]
    with ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(study.train, run) for run in missing]
        for task in track(tasks, f"{len(missing)} runs"):
            task.result()
    write_report(out)


def check_names(option: str, given: str, known: Iterable[str]) -> None:
    unknown = set(given.split(",")) - set(known) - {""}
    if unknown:
        raise UsageError(f"{option}: unknown {', '.join(sorted(unknown))}; choose from {', '.join(known)}.")


def raw_datasets(data: Path | None, raw: Path) -> dict[str, Path]:
    """The folders of the datasets by name; two are generated."""
    folders = sorted(data.glob("Dataset*")) if data else []
    return {folder.name: folder for folder in [*folders, *write_datasets(raw)]}


class Study:
    """A folder with the study's datasets, trainings and tables."""

    def __init__(self, out: Path, device: str):
        self.out = out
        self.device = device
        self.raw, self.preprocessed, self.results = (out / part for part in ("raw", "preprocessed", "results"))
        for folder in (self.raw, self.preprocessed, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        self.writing = Lock()

    def run(self, command: list[object], log: Path, **variables: str) -> None:
        """Run a command of nnU-Net on the folders of the study."""
        own = {"nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1", "nnUNet_compile": "f"}
        run_command(command, log, {**folders_below(self.out), **trainers_first(TRAINERS_FOLDER), **own, **variables})

    def prepare(self, folder: Path) -> str:
        """Plan and preprocess a dataset, add the configuration and the scarce folds of the study; gives its name."""
        name = folder.name
        number = convert_dataset_name_to_id(name)
        target = self.preprocessed / name
        if (target / SPLITS).is_file():  # it is written last
            return name
        if not (self.raw / name).exists():
            (self.raw / name).symlink_to(folder.absolute())
        plan = ["nnUNetv2_plan_and_preprocess", "-d", number, "-npfp", 2, "--clean", "--no_pp"]
        self.run(plan, self.out / f"plan_{name}.log")
        plans_file = target / f"{PLANS}.json"
        plans = read_json(plans_file, "configurations")
        plans["configurations"][TRAINED] = study_configuration(plans["configurations"][PLANNED], name in THIN)
        plans_file.write_text(json.dumps(plans, indent=4))
        preprocess = ["nnUNetv2_preprocess", "-d", number, "-c", TRAINED, "-np", 2]
        self.run(preprocess, self.out / f"preprocess_{name}.log")
        splits = read_splits(folder) if (folder / SPLITS).is_file() else [random_split(folder)]
        write_splits(target, [*splits, *scarce_folds(splits[0])])
        return name

    def fold_folder(self, run: Run) -> FoldFolder:
        """Where nnU-Net writes a run; each seed, number of steps and optimiser has a results folder of its own."""
        folds = len(read_splits(self.preprocessed / run.dataset))
        fold = 0 if run.size == "full" else folds - MOST_SEEDS + run.seed
        return ModelFolder.of(self.results_of(run), run.dataset, f"Study{run.arm}", PLANS, TRAINED).fold(fold)

    def results_of(self, run: Run) -> Path:
        return self.results / f"seed_{run.seed}_{run.steps}_steps_{run.optimiser}"

    def is_finished(self, run: Run) -> bool:
        file = self.out / "runs.csv"
        return file.is_file() and bool((pd.read_csv(file)[KEY] == pd.Series(asdict(run))).all(axis=1).any())

    def train(self, run: Run) -> None:
        """Train and validate with nnU-Net, add the run to the tables, and delete what nobody needs."""
        folder = self.fold_folder(run)
        shutil.rmtree(folder.path, ignore_errors=True)
        folder.path.mkdir(parents=True)
        self.run(
            ["nnUNetv2_train", run.dataset, TRAINED, folder.fold]
            + ["-tr", f"Study{run.arm}", "-p", PLANS, "-device", self.device],
            folder.path / "stdout.log",
            nnUNet_results=str(self.results_of(run)),
            nnUNet_n_proc_DA="0",  # the same batches for every arm
            NNUNET_LOMIX_STUDY=json.dumps(budget(run)),
        )
        tables = read_run(folder, self.preprocessed / run.dataset, run.dataset in THIN)
        with self.writing:
            self.add_to_tables(run, tables)
        for file in [*folder.path.glob("checkpoint*"), *folder.path.rglob("*.nii.gz")]:
            file.unlink()

    def add_to_tables(self, run: Run, tables: dict[str, pd.DataFrame]) -> None:
        """Add rows; that of the run itself comes last, since a run in runs.csv is finished."""
        known = pd.read_csv(self.out / "scores.csv")["run"] if (self.out / "scores.csv").exists() else []
        number = max(known, default=0) + 1
        for name, rows in [*tables.items(), ("runs", pd.DataFrame([asdict(run)]))]:
            rows.insert(0, "run", number)
            file = self.out / f"{name}.csv"
            rows.to_csv(file, mode="a", index=False, header=not file.exists(), float_format="%.5g")


def budget(run: Run) -> dict[str, Any]:
    """What the trainers of the study read in NNUNET_LOMIX_STUDY."""
    return {"seed": run.seed, "epochs": EPOCHS, "iterations": run.steps // EPOCHS, "optimiser": run.optimiser}


def study_configuration(planned: dict[str, Any], thin: bool) -> dict[str, Any]:
    """nnU-Net's configuration with fewer channels and smaller patches and batches, of the same kind otherwise.

    With thin structures the spacing stays as planned.
    """
    architecture = deepcopy(planned["architecture"])
    kwargs = architecture["arch_kwargs"]
    coarser = 2 if max(planned["patch_size"]) > COARSE_ABOVE and not thin else 1
    patch = [min(p // coarser, MAX_PATCH) for p in planned["patch_size"]]
    strides = np.cumprod(kwargs["strides"], axis=0)
    # as many stages as leave at least 5 pixels of a patch along each axis
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
        "inherits_from": PLANNED,
        "data_identifier": f"{PLANS}_{TRAINED}",
        "spacing": [coarser * s for s in planned["spacing"]],
        "patch_size": patch,
        "batch_size": batch_size,
        "architecture": architecture,
    }


def random_split(raw: Path) -> Split:
    """A fifth of the training cases of a raw dataset for validation."""
    ending = read_dataset_json(raw)["file_ending"]
    cases = list(list_cases(raw / "labelsTr", ending))
    order = np.random.default_rng(0).permutation(cases).tolist()
    fifth = len(order) // 5
    return Split(train=sorted(order[fifth:]), val=sorted(order[:fifth]))


def scarce_folds(fold: Split) -> list[Split]:
    """A fold with a random part of its training cases, for each seed another."""
    train = sorted(fold["train"])
    size = max(2, round(SCARCE_FRACTION * len(train)))
    draws = [np.random.default_rng(seed).choice(train, size, replace=False) for seed in range(MOST_SEEDS)]
    return [Split(train=sorted(draw.tolist()), val=fold["val"]) for draw in draws]


def read_run(folder: FoldFolder, dataset: Path, thin: bool) -> dict[str, pd.DataFrame]:
    """The rows that a run adds to each table: its scores, epochs, and weights at the end.

    Args:
        folder: of the run.
        dataset: its preprocessed dataset.
        thin: whether its structures have a centre line, for clDice.
    """
    history = folder.path / TABLE
    last = pd.read_csv(history).drop(columns="epoch").iloc[-1] if history.is_file() else pd.Series(dtype=float)
    validations = {file.parent.parent.name: file.parent for file in folder.path.glob("*/validation/summary.json")}
    return {
        "scores": pd.concat(
            score(predictions, dataset, thin).assign(output=output)
            for output, predictions in [("z_0", folder.validation), *sorted(validations.items())]
        ),
        "curves": read_curves(folder)[["epoch", "seconds", "train_loss", "pseudo_dice"]],
        "weights": pd.DataFrame({"map": last.index, "weight": last.to_numpy()}),
    }


def score(predictions: Path, dataset: Path, thin: bool) -> pd.DataFrame:
    """Mean scores over the classes of each case; arguments as for :func:`read_run`.

    The Dice is 1 where neither reference nor prediction has a class, and the NSD has a tolerance of 1 mm, or a pixel.
    """
    description = read_json(dataset / "dataset.json", "labels")
    labels = {name: (value,) for name, value in description["labels"].items() if value}
    metrics = ["Dice", "NSD", "clDice"] if thin else ["Dice", "NSD"]
    rows = []
    for reference in sorted((dataset / "gt_segmentations").iterdir()):
        prediction = predictions / reference.name
        if prediction.exists():
            settings = ScoringSettings(labels, None, find_reader(description, reference), metrics, placed=False)
            values = pd.DataFrame(score_case(reference, {"": prediction}, settings)[""].scores)  # metrics by classes
            means = values.mean(axis=1).reindex(["Dice", "NSD", "clDice"]).rename(str.lower)
            rows.append({"case": reference.name.split(".")[0], **means})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
