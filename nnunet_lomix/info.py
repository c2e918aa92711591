"""What is installed, and what nnU-Net finds."""

import importlib.metadata
import os
import platform

import torch  # its import registers our folder with nnU-Net
from rich.console import Console
from rich.table import Column, Table

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.registration import FOLDER, VARIABLE

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
    from nnunet_lomix.nnunet.trainers import find_trainer
    from nnunet_lomix.trainers import TRAINERS

    problems: dict[str, str | None] = {}
    for trainer in TRAINERS:
        name = trainer.__name__
        try:
            found = find_trainer(name)
        except LoMixError as error:
            problems[name] = why_not_registered() or str(error)
        else:
            problems[name] = None
            if found is not trainer:
                problems[name] = f"A class of the same name in {found.__module__} comes first; rename it."
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

    return {t.__name__: (t.__doc__ or "").split("\n\n")[0] for t in TRAINERS}
