"""What is installed, and what nnU-Net finds."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from textwrap import fill

import torch  # its import registers our folder with nnU-Net
from rich.console import Console
from rich.text import Text

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.registration import FOLDER, VARIABLE

PACKAGES = ("nnunet_lomix", "nnunetv2", "torch", "torchvision", "dynamic_network_architectures")
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def print_info() -> bool:
    """Print versions, nnU-Net's variables, and each trainer and whether nnU-Net finds it; True if it finds all."""
    console = Console()
    for name, value in (*list_versions(), *list_variables()):
        console.print(f"{name:30} {value}", soft_wrap=True, markup=False, highlight=False)
    try:
        with console.status("nnU-Net looks for the trainers"):
            trainers, problems = look_up_trainers()
    except ImportError as error:
        console.print(f"nnU-Net can't be used: {error}. Install it with: pip install 'nnunetv2>=2.8.0'", markup=False)
        return False
    for trainer, problem in trainers:
        found = Text(" not found", "red") if problem else Text(" found", "green")
        console.print("", Text(trainer.__name__, "bold") + found, sep="\n", soft_wrap=True)
        console.print(Text(fill(summarise(trainer), console.width, initial_indent="  ", subsequent_indent="  ")))
    problems += [problem for _, problem in trainers if problem]
    for problem in dict.fromkeys(problems):
        console.print("", Text(problem), sep="\n", soft_wrap=True)
    return not problems


def list_versions() -> Iterator[tuple[str, str]]:
    """Version of Python and of each package that matters, and the accelerator."""
    yield "python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    if torch.cuda.is_available():
        yield "accelerator", torch.cuda.get_device_name()
    else:
        yield "accelerator", "mps" if torch.backends.mps.is_available() else "none, CPU only"


def list_variables() -> Iterator[tuple[str, str]]:
    """nnU-Net's variables and their values, or that one is not set, or names no folder."""
    for variable in FOLDERS:
        value = os.environ.get(variable)
        if not value:
            yield variable, f"not set, though nnU-Net's commands need it: export {variable}=/your/folder"
        else:
            yield variable, value if os.path.isdir(value) else f"{value} (not there)"
    yield VARIABLE, os.environ.get(VARIABLE) or "not set"


def look_up_trainers() -> tuple[list[tuple[type, str | None]], list[str]]:
    """Our trainers and those in the user's own folders, each with the reason if nnU-Net doesn't find it.

    Returns:
        These, and what is wrong with the folders themselves, a sentence for each thing.

    Raises:
        ImportError: nnU-Net or one of our trainers can't be imported.
    """
    from nnunet_lomix.nnunet.trainer_lookup import list_external_trainers
    from nnunet_lomix.trainers import TRAINERS

    external, problems = list_external_trainers()
    return [(trainer, why_not_found(trainer)) for trainer in (*TRAINERS, *external)], problems


def why_not_found(trainer: type) -> str | None:
    """Why nnU-Net's own look-up doesn't find a trainer; None if it does."""
    from nnunet_lomix.nnunet.trainer_lookup import look_up_trainer

    name = trainer.__name__
    try:
        found = look_up_trainer(name)
    except LoMixError as error:
        ours = trainer.__module__.startswith("nnunet_lomix.")
        return (why_not_registered() if ours else None) or str(error)
    # nnU-Net imports a user's module anew, so that the same class is another object
    if found.__module__ == trainer.__module__:
        return None
    return f"nnU-Net takes {name} of {found.__module__} for that of {trainer.__module__}: rename one of them."


def why_not_registered() -> str | None:
    """Why our folder is not among those that nnU-Net searches, or None if it is."""
    if FOLDER in os.environ.get(VARIABLE, "").split(os.pathsep):
        return None
    cause = f"{VARIABLE} was overwritten"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        cause = "TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches the registration off"
    # appended, so that the folders of the user stay
    return f'{cause}; mend it with: export {VARIABLE}="${{{VARIABLE}:+${VARIABLE}:}}{FOLDER}"'


def summarise(trainer: type) -> str:
    """The first paragraph of a class's own docstring; empty if it has none."""
    return " ".join((trainer.__doc__ or "").split("\n\n")[0].split())
