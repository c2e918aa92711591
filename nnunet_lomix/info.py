"""What is installed, and what nnU-Net finds."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch  # its import registers our folder with nnU-Net
from rich.console import Console
from rich.table import Column, Table

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.registration import FOLDER, VARIABLE

PACKAGES = ("nnunet_lomix", "nnunetv2", "torch", "torchvision", "dynamic_network_architectures")


@dataclass(frozen=True)
class Found:
    """A trainer, and whether nnU-Net finds it.

    Attributes:
        name: for ``-tr``.
        summary: the first paragraph of its docstring.
        problem: why nnU-Net doesn't find it, in one sentence; None if it does.
    """

    name: str
    summary: str
    problem: str | None


def print_info() -> bool:
    """Print versions, and each trainer with its summary and whether nnU-Net finds it; True if it finds all."""
    console = Console()
    table = Table("package", "version", box=None)
    for row in versions().items():
        table.add_row(*row)
    console.print(table, "")
    try:
        with console.status("nnU-Net looks for the trainers"):
            found = list(look_up_ours())
            external, problems = look_up_external()
    except ImportError as error:
        console.print(f"nnU-Net can't be used: {error}. Install it with: pip install 'nnunetv2>=2.8.0'", markup=False)
        return False
    table = Table(Column("trainer (-tr)", no_wrap=True), "what it does", Column("nnU-Net", no_wrap=True), box=None)
    for trainer in found + external:
        table.add_row(trainer.name, trainer.summary, "not found" if trainer.problem else "found")
    console.print(table)
    problems += [trainer.problem for trainer in found + external if trainer.problem]
    for problem in dict.fromkeys(problems):
        console.print("", problem, soft_wrap=True, markup=False)
    return not problems


def versions() -> dict[str, str]:
    """Version of Python and of each package that matters, and the accelerator."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    else:
        found["accelerator"] = "mps" if torch.backends.mps.is_available() else "none, CPU only"
    return found


def look_up_ours() -> Iterator[Found]:
    """Our trainers: nnU-Net's own look-up is run for each of them.

    Raises:
        ImportError: nnU-Net or one of our trainers can't be imported.
    """
    from nnunet_lomix.nnunet.trainer_lookup import look_up_trainer
    from nnunet_lomix.trainers import TRAINERS

    for trainer in TRAINERS:
        problem = None
        try:
            found = look_up_trainer(trainer.__name__)
        except LoMixError as error:
            problem = why_not_registered() or str(error)
        else:
            if found is not trainer:
                problem = f"A class of the same name in {found.__module__} comes first; rename it."
        yield Found(trainer.__name__, summarise(trainer), problem)


def look_up_external() -> tuple[list[Found], list[str]]:
    """The trainers in the user's own folders, and what is wrong with these folders, a sentence for each thing.

    Raises:
        ImportError: nnU-Net can't be imported.
    """
    from nnunet_lomix.nnunet.trainer_lookup import list_external_trainers, look_up_trainer

    trainers, problems = [], []
    for external in list_external_trainers():
        problems += external.problems
        for name, trainer in external.trainers.items():
            problem = None
            try:
                found = look_up_trainer(name)
            except LoMixError as error:
                problem = str(error)
            else:
                # nnU-Net imports the module anew, so that this is another object for the same class
                if found.__module__ != trainer.__module__:
                    problem = f"nnU-Net takes {name} of {found.__module__} for that of {external.folder}: rename yours."
            trainers.append(Found(name, summarise(trainer), problem))
    return trainers, problems


def why_not_registered() -> str | None:
    """Why our folder is not among those that nnU-Net searches, or None if it is."""
    if FOLDER in os.environ.get(VARIABLE, "").split(os.pathsep):
        return None
    cause = f"{VARIABLE} was overwritten"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        cause = "TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches the registration off"
    return f"{cause}; mend it with: export {VARIABLE}={FOLDER}"


def summarise(trainer: type) -> str:
    """The first paragraph of a class's own docstring; empty if it has none."""
    return " ".join((trainer.__doc__ or "").split("\n\n")[0].split())
