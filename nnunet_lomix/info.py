"""What is installed, and what nnU-Net finds."""

import contextlib
import importlib.metadata
import io
import os
import platform

import torch  # its import registers our folder with nnU-Net

from nnunet_lomix.registration import FOLDER, VARIABLE

PACKAGES = ("nnunet_lomix", "nnunetv2", "torch", "torchvision", "dynamic_network_architectures")


def versions() -> dict[str, str]:
    """Version of Python, of each package that matters, and the kind of accelerator."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    found["accelerator"] = str(accelerator or ("cuda" if torch.cuda.is_available() else "none, CPU only"))
    return found


def lookup() -> dict[str, str]:
    """For each of our trainers "found", or the reason why nnU-Net would not find it: nnU-Net's own look-up is run.

    Raises:
        ImportError: nnU-Net or one of our trainers can't be imported.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_lomix.trainers import TRAINERS

    results = {}
    for trainer in TRAINERS:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = recursive_find_trainer_class_by_name(trainer.__name__)
        # whatever any module of nnU-Net or of the user's folders raises when it is imported is the answer
        except Exception as error:
            results[trainer.__name__] = f"not found: {reason() or error}"
        else:
            results[trainer.__name__] = (
                "found" if found is trainer else f"hidden by a class of that name in {found.__module__}"
            )
    return results


def reason() -> str | None:
    """Why our folder is not registered with nnU-Net, or None if it is."""
    if FOLDER in os.environ.get(VARIABLE, "").split(os.pathsep):
        return None
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return (
            f"TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches the registration off; unset it, or export {VARIABLE}={FOLDER}"
        )
    return f"{VARIABLE} was overwritten; export {VARIABLE}={FOLDER}"


def summaries() -> dict[str, str]:
    """For each of our trainers the first sentence of its docstring."""
    from nnunet_lomix.trainers import TRAINERS

    return {t.__name__: t.__doc__.strip().split("\n\n")[0].replace("\n", " ") for t in TRAINERS}
