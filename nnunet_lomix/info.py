"""What is installed, and what nnU-Net finds."""

import contextlib
import importlib.metadata
import io
import os
import platform

import torch  # its import registers our folder with nnU-Net
from rich.console import Console
from rich.table import Column, Table

from nnunet_lomix.registration import FOLDER, VARIABLE

PACKAGES = ("nnunet_lomix", "nnunetv2", "torch", "torchvision", "dynamic_network_architectures")


def print_info() -> bool:
    """Print versions, and each trainer with its summary and whether nnU-Net finds it; True if it finds all."""
    console = Console()
    table = Table("package", "version", box=None)
    for row in versions().items():
        table.add_row(*row)
    console.print(table, "")
    try:
        with console.status("nnU-Net looks for the trainers"):
            problems = lookup()
    except ImportError as error:
        console.print(f"nnU-Net can't be used: {error}. Install it with: pip install 'nnunetv2>=2.8.0'")
        return False
    table = Table(Column("trainer (-tr)", no_wrap=True), "what it does", Column("nnU-Net", no_wrap=True), box=None)
    for name, summary in summaries().items():
        table.add_row(name, summary, "not found" if problems[name] else "found")
    console.print(table)
    for problem in dict.fromkeys(filter(None, problems.values())):
        console.print("", problem, soft_wrap=True)
    return not any(problems.values())


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


def lookup() -> dict[str, str | None]:
    """For each of our trainers None, or the reason why nnU-Net doesn't find it: nnU-Net's own look-up is run.

    Raises:
        ImportError: nnU-Net or one of our trainers can't be imported.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_lomix.trainers import TRAINERS

    problems = dict.fromkeys(t.__name__ for t in TRAINERS)
    for trainer in TRAINERS:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = recursive_find_trainer_class_by_name(trainer.__name__)
        # whatever a module of nnU-Net or in a folder of the user raises when it is imported is the answer
        except (Exception, SystemExit) as error:
            problems[trainer.__name__] = why_not_registered() or f"nnU-Net's look-up failed: {error}"
        else:
            if found is not trainer:
                problems[trainer.__name__] = f"A class of the same name in {found.__module__} comes first; rename it."
    return problems


def why_not_registered() -> str | None:
    """Why our folder is not among those that nnU-Net searches, or None if it is."""
    if FOLDER in os.environ.get(VARIABLE, "").split(os.pathsep):
        return None
    cause = f"{VARIABLE} was overwritten"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        cause = "TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches the registration off"
    return f"{cause}; mend it with: export {VARIABLE}={FOLDER}"


def summaries() -> dict[str, str]:
    """For each of our trainers the first paragraph of its docstring."""
    from nnunet_lomix.trainers import TRAINERS

    return {t.__name__: t.__doc__.split("\n\n")[0] for t in TRAINERS}
