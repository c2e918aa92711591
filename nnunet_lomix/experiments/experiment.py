"""What an experiment trains: datasets × configurations × plans × trainers × folds × seeds."""

import itertools
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from nnunet_lomix.errors import LoMixError, UsageError
from nnunet_lomix.experiments import SCHEDULERS
from nnunet_lomix.experiments.training import Training

DEVICES = ("cuda", "cpu", "mps")
OPTIONS = ("--npz", "-pretrained_weights", "-num_gpus", "--val_best")  # of nnUNetv2_train, left to the user
REQUIRED = ("datasets", "configurations", "trainers")
AXES = (*REQUIRED, "plans", "folds", "results")


@dataclass(frozen=True)
class Experiment:
    """All trainings of an experiment, and where they run."""

    datasets: tuple[str, ...]  # numbers or names
    configurations: tuple[str, ...]
    trainers: tuple[str, ...]  # the first one is the reference of the report
    plans: tuple[str, ...] = ("nnUNetPlans",)  # those of nnU-Net's own planners are made where they are missing
    folds: tuple[str, ...] = ("0", "1", "2", "3", "4")  # or "all"
    # One for each seed: nnU-Net's trainings are not seeded, so another results folder is another seed. None for
    # nnUNet_results.
    results: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # further arguments of nnUNetv2_train, of OPTIONS
    device: str | None = None  # of DEVICES; None for CUDA where there is one, and on a cluster
    gpus: tuple[str, ...] = ()  # of this machine, each for one training at a time; none for all
    jobs: int = 1  # trainings at a time where there is no GPU
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)  # options of one of SCHEDULERS, by its name
    out: str = "nnunet_lomix_run"  # folder for logs and the report

    def list_trainings(self) -> list[Training]:
        """All, dataset by dataset; a LoMixError if a dataset isn't there, or a variable of nnU-Net is not set."""
        from nnunet_lomix.nnunet.datasets import name_dataset, require_root  # slow to import

        results = [Path(folder) for folder in self.results] or [require_root("nnUNet_results")]
        datasets = [name_dataset(dataset, results=self.results) for dataset in self.datasets]
        out = Path(self.out).absolute()
        axes = (datasets, self.configurations, self.plans, self.trainers, enumerate(results), self.folds)
        return [
            Training(dataset, configuration, plans, trainer, fold, folder, out, seed)
            for dataset, configuration, plans, trainer, (seed, folder), fold in itertools.product(*axes)
        ]


def read_experiment(file: str | Path | None, options: Mapping[str, Any]) -> Experiment:
    """An experiment from a YAML file, from options, or from a file with options in place of some of its entries.

    Entries are the attributes of :class:`Experiment`, and the name of a scheduler in place of ``schedulers``.

    Args:
        file: a mapping of entries, where a list of one thing may be that thing; or None.
        options: entries; None and empty ones are not given; those of a scheduler are added to the file's.

    Raises:
        LoMixError: the file can't be read, or an entry isn't what it should be; the sentence says which.
        UsageError: neither file nor options say what to train.
    """
    entries = _read_file(Path(file)) if file else {}
    for name, value in options.items():
        if value not in (None, (), {}):
            both = isinstance(value, dict) and isinstance(entries.get(name), dict)
            entries[name] = entries[name] | value if both else value
    where = f"{file}: " if file else ""
    known = [name for f in fields(Experiment) for name in (SCHEDULERS if f.name == "schedulers" else [f.name])]
    for name in entries:
        if name not in known:
            close = get_close_matches(str(name), known, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}."
            raise LoMixError(f"{where}{name!r} is not an entry of an experiment: {hint}")
    missing = [name for name in REQUIRED if not entries.get(name)]
    if missing:
        raise UsageError(f"{where}{', '.join(missing)} must be given, in a file or as options.")
    try:
        values = {name: _convert(name, value) for name, value in entries.items()}
        schedulers = {name: values.pop(name) for name in SCHEDULERS if name in values}
        experiment = Experiment(**values, schedulers=schedulers)
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
    if name in SCHEDULERS:
        if not isinstance(value, dict) or not all(isinstance(key, str) and key for key in value):
            example = SCHEDULERS[name].example.split()[0].replace("=", ": ")
            raise ValueError(f"{name} must be {SCHEDULERS[name].command}'s options, such as '{example}'")
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
    if not values or not all(isinstance(text, str) and text.strip() for text in values):
        raise ValueError(f"{name} must be a list of names or numbers, not {value!r}")
    if name == "options":
        return tuple(part for text in values for part in shlex.split(text))
    if name == "folds":
        return tuple(str(int(fold)) if re.fullmatch("[0-9]{1,4}", fold) else fold for fold in values)
    if name == "results":
        return tuple(os.path.abspath(os.path.expanduser(folder)) for folder in values)
    return tuple(text.rstrip("/") for text in values)  # the shell completes names of folders with it


def _check(experiment: Experiment) -> None:
    if len(experiment.schedulers) > 1:
        raise ValueError(f"{' and '.join(experiment.schedulers)} don't go together")
    if experiment.device not in (None, *DEVICES):
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {experiment.device!r}")
    if experiment.gpus and experiment.device in ("cpu", "mps"):
        raise ValueError(f"gpus don't go with the device {experiment.device}")
    if experiment.gpus and experiment.jobs > 1:
        raise ValueError("jobs don't go with gpus, each of which trains one at a time")
    for fold in experiment.folds:
        if fold != "all" and not re.fullmatch("[0-9]+", fold):
            raise ValueError(f"folds must be numbers or all, such as [0, 1] in a file and -f 0 1, not {fold!r}")
    wrong = [option for option in experiment.options if option.startswith("-") and option not in OPTIONS]
    if wrong:
        raise ValueError(f"options has {', '.join(wrong)}, but may have {', '.join(OPTIONS)} alone")
    for option, value in itertools.pairwise((*experiment.options, "")):
        if option == "-pretrained_weights" and not os.path.isfile(value):
            raise ValueError(f"options: -pretrained_weights needs a file, and there is no {value!r}")
        if option == "-num_gpus" and not value.isdecimal():
            raise ValueError(f"options: -num_gpus needs a number, not {value!r}")
    for name in AXES:
        values = getattr(experiment, name)
        if len(set(values)) < len(values):
            raise ValueError(f"{name} has an entry twice: {', '.join(values)}")
        # they become names of folders
        if name != "results" and any("/" in value or "\\" in value or "\0" in value for value in values):
            raise ValueError(f"{name} must be names, not paths: {', '.join(values)}")
