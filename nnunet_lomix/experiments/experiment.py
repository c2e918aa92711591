"""What an experiment trains: datasets × configurations × plans × trainers × folds × seeds."""

import itertools
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from nnunet_lomix.errors import LoMixError, UsageError
from nnunet_lomix.experiments.training import Training

DEVICES = ("cuda", "cpu", "mps")
OPTIONS = ("--npz", "-pretrained_weights", "-num_gpus", "--val_best")  # of nnUNetv2_train, left to the user
REQUIRED = ("datasets", "configurations", "trainers")


@dataclass(frozen=True)
class Experiment:
    """All trainings of an experiment, and where they run.

    Attributes:
        datasets: numbers or names.
        configurations: "2d", …
        trainers: the first one is the reference of the report.
        plans: names of plans; those of nnU-Net's own planners are made where they are missing.
        folds: "0", …, "all".
        results: results folders, one for each seed: nnU-Net's trainings are not seeded, so another folder is another
            seed; none for ``nnUNet_results``.
        options: further arguments of nnUNetv2_train, of OPTIONS.
        device: "cuda", "cpu" or "mps"; None for CUDA where there is one, and on a cluster.
        gpus: numbers of the GPUs of this machine, each for one training at a time; none for all.
        jobs: how many trainings run at a time where there is no GPU.
        slurm: sbatch's options by their long names; None to run on this machine.
        out: folder for logs and the report.
    """

    datasets: tuple[str, ...]
    configurations: tuple[str, ...]
    trainers: tuple[str, ...]
    plans: tuple[str, ...] = ("nnUNetPlans",)
    folds: tuple[str, ...] = ("0", "1", "2", "3", "4")
    results: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    device: str | None = None
    gpus: tuple[str, ...] = ()
    jobs: int = 1
    slurm: dict[str, Any] | None = None
    out: str = "nnunet_lomix_run"

    def list_trainings(self) -> list[Training]:
        """All of them, dataset by dataset.

        Raises:
            LoMixError: a dataset isn't there, or a variable of nnU-Net is not set.
        """
        from nnunet_lomix.nnunet.datasets import name_dataset, require_root  # slow to import

        results = [Path(folder) for folder in self.results] or [require_root("nnUNet_results")]
        datasets = [name_dataset(dataset) for dataset in self.datasets]
        out = Path(self.out).absolute()
        axes = (datasets, self.configurations, self.plans, self.trainers, enumerate(results), self.folds)
        return [
            Training(dataset, configuration, plans, trainer, fold, folder, out, seed)
            for dataset, configuration, plans, trainer, (seed, folder), fold in itertools.product(*axes)
        ]


def read_experiment(file: str | Path | None, options: Mapping[str, Any]) -> Experiment:
    """An experiment from a YAML file, from options, or from a file with options in place of some of its entries.

    Args:
        file: a mapping of :class:`Experiment`'s attributes, where a list of one thing may be that thing; or None.
        options: attributes; None and empty ones are not given; those of slurm are added to the file's.

    Raises:
        LoMixError: the file can't be read, or an entry isn't what it should be; the sentence says which.
        UsageError: neither file nor options say what to train.
    """
    entries = _read_file(Path(file)) if file else {}
    given = {name: value for name, value in options.items() if value not in (None, (), {})}
    if isinstance(entries.get("slurm"), dict) and isinstance(given.get("slurm"), dict):
        given["slurm"] = entries["slurm"] | given["slurm"]
    entries |= given
    where = f"{file}: " if file else ""
    known = [field.name for field in fields(Experiment)]
    for name in entries:
        if name not in known:
            close = get_close_matches(str(name), known, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}."
            raise LoMixError(f"{where}{name!r} is not an entry of an experiment: {hint}")
    missing = [name for name in REQUIRED if not entries.get(name)]
    if missing:
        raise UsageError(f"{where}{', '.join(missing)} must be given, in a file or as options.")
    try:
        experiment = Experiment(**{name: _convert(name, value) for name, value in entries.items()})
        _check(experiment)
    except ValueError as error:
        raise LoMixError(f"{where}{error}.") from None
    return experiment


def _read_file(file: Path) -> dict[str, Any]:
    try:
        # everything as it is written: YAML itself would read 010 as 8, and 24:00:00 as seconds
        content = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    except OSError as error:
        raise LoMixError(f"{file} can't be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LoMixError(f"{file} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise LoMixError(f"{file} is not an experiment: it must have the entries {', '.join(REQUIRED)}, and may more.")
    return content


def _convert(name: str, value: Any) -> Any:
    """An entry as :class:`Experiment` wants it; a ValueError says what it should have been."""
    if name == "slurm":
        if not isinstance(value, dict) or not all(isinstance(key, str) and key for key in value):
            raise ValueError("slurm must be sbatch's options, such as 'partition: gpu'")
        return value
    if name == "jobs":
        if not re.fullmatch("[0-9]{1,4}", str(value)) or int(value) < 1:
            raise ValueError(f"jobs must be a number from 1 on, not {value!r}")
        return int(value)
    if name in ("device", "out"):
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a text, not {value!r}")
        return value
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    texts = tuple(v for v in values if isinstance(v, str) and v.strip())
    if not texts or len(texts) != len(values):
        raise ValueError(f"{name} must be a list of names or numbers, not {value!r}")
    if name == "options":
        return tuple(part for text in texts for part in shlex.split(text))
    if name == "folds":
        return tuple(str(int(fold)) if re.fullmatch("[0-9]{1,4}", fold) else fold for fold in texts)
    if name == "results":
        return tuple(os.path.abspath(os.path.expanduser(folder)) for folder in texts)
    return tuple(text.rstrip("/") for text in texts)  # the shell completes names of folders with it


def _check(experiment: Experiment) -> None:
    if experiment.device not in (None, *DEVICES):
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {experiment.device!r}")
    if experiment.gpus and experiment.device in ("cpu", "mps"):
        raise ValueError(f"gpus don't go with the device {experiment.device}")
    for fold in experiment.folds:
        if fold != "all" and not re.fullmatch("[0-9]+", fold):
            raise ValueError(f"folds must be numbers or all, such as [0, 1] in a file and -f 0 1, not {fold!r}")
    wrong = [option for option in experiment.options if option.startswith("-") and option not in OPTIONS]
    if wrong:
        raise ValueError(f"options has {', '.join(wrong)}, but may have {', '.join(OPTIONS)} alone")
    for option, value in itertools.zip_longest(experiment.options, experiment.options[1:], fillvalue=""):
        if option == "-pretrained_weights" and not os.path.isfile(value):
            raise ValueError(f"options: -pretrained_weights needs a file, and there is no {value!r}")
        if option == "-num_gpus" and not value.isdecimal():
            raise ValueError(f"options: -num_gpus needs a number, not {value!r}")
    for name in ("datasets", "configurations", "trainers", "plans", "folds", "results"):
        values = getattr(experiment, name)
        if len(set(values)) < len(values):
            raise ValueError(f"{name} has an entry twice: {', '.join(values)}")
        # they become names of folders
        if name != "results" and any("/" in value or "\\" in value or "\0" in value for value in values):
            raise ValueError(f"{name} must be names, not paths: {', '.join(values)}")
