"""Which trainer nnU-Net takes for a name, of ``-tr`` or of a checkpoint, and which ones a user's folders have."""

import contextlib
import importlib
import io
import os
import pkgutil
import re
from collections.abc import Iterator
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import nnunetv2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_class_by_name import temporarily_cleanup_imports_from_path, temporarily_extend_syspath
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_lomix.errors import LoMixError, describe
from nnunet_lomix.nnunet.registration import FOLDER, VARIABLE


class TrainerNotFound(LoMixError):
    """No trainer of that name is installed here."""


def look_up_trainer(name: str) -> type[nnUNetTrainer]:
    """The class, by nnU-Net's own look-up.

    Raises:
        TrainerNotFound: the look-up found no such trainer.
        LoMixError: the look-up failed, mostly since a module that nnU-Net searches can't be imported.
    """
    theirs = f"Could not find requested nnunet trainer {name} "
    ours = f"nnunet_lomix has no trainer {name!r}"  # for a name that looks like one of ours; it suggests that one
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the look-up prints where it searches
            return recursive_find_trainer_class_by_name(name)
    # the modules that nnU-Net searches may raise anything at all when they are imported
    except (Exception, SystemExit) as error:
        if str(error).startswith(ours) and not _find_alike(name, 0.9):
            raise TrainerNotFound(str(error)) from None
        if str(error).startswith((theirs, ours)):
            remedy = "'nnunet_lomix info' lists ours and those of your folders."
            if "," in name:
                remedy = "separate names by blanks."
            elif alike := _find_alike(name, 0.8):
                remedy = f"did you mean {alike[0]}?"
            raise TrainerNotFound(f"nnU-Net finds no trainer {name}: {remedy}") from None
        raise LoMixError(f"nnU-Net's look-up of trainers failed: {describe(error)}.") from error


def _find_alike(name: str, cutoff: float) -> list[str]:
    """The class most like a name in the modules that nnU-Net searches; they are read, not imported."""
    names = set()
    for folder in (os.path.join(nnunetv2.__path__[0], "training", "nnUNetTrainer"), *_list_folders()):
        for _, file in _list_modules(folder):
            with contextlib.suppress(OSError):  # a module that is no file of Python's, or somebody else's
                names.update(re.findall(r"^class (\w+)\(", Path(file).read_text(errors="replace"), re.M))
    return get_close_matches(name, names, 1, cutoff)


def list_external_trainers() -> tuple[list[type[nnUNetTrainer]], list[str]]:
    """The trainers in the folders of ``nnUNet_extTrainer`` but ours, in nnU-Net's order; it imports all modules there.

    Returns:
        The classes that the modules define, and what keeps nnU-Net from finding others, a sentence for each thing.
    """
    trainers, problems = [], []
    for folder in _list_folders():
        if not os.path.isdir(folder):
            problems.append(f"{folder} is not a folder, though {VARIABLE} names it: mend the variable.")
        elif folder != FOLDER:
            # as nnU-Net does it, so that its next look-up imports these modules anew
            with (
                temporarily_extend_syspath(folder),
                temporarily_cleanup_imports_from_path(folder),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                for name, file in _list_modules(folder):
                    try:
                        defined = vars(_import_module(name, file)).values()
                    except LoMixError as error:
                        problems.append(str(error))
                    else:
                        classes = [c for c in defined if isinstance(c, type) and issubclass(c, nnUNetTrainer)]
                        trainers += [c for c in classes if c.__module__ == name]  # not those that it imports
    return trainers, problems


def _list_folders() -> list[str]:
    """Of ``nnUNet_extTrainer``, each once."""
    folders = os.environ.get(VARIABLE, "").split(os.pathsep)
    return [folder for folder in dict.fromkeys(folders) if folder.strip()]


def _import_module(name: str, file: str) -> ModuleType:
    """A module by its name.

    Raises:
        LoMixError: it can't be imported, or is another file's than the given one.
    """
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # somebody else's code may raise anything at all
        raise LoMixError(
            f"{file} can't be imported, and nnU-Net's look-up stops there: {describe(error)}; mend it."
        ) from error
    origin = getattr(module, "__file__", None) or "Python itself"
    if os.path.dirname(os.path.realpath(origin)) != os.path.dirname(os.path.realpath(file)):
        raise LoMixError(f"{file} is not used, as {origin} has the same name in Python: rename the file.")
    return module


def _list_modules(folder: str, package: str = "") -> Iterator[tuple[str, str]]:
    """Name and file of each module that nnU-Net asks for a trainer: those of a folder, then those of its packages."""
    for entry in sorted(pkgutil.iter_modules([folder]), key=attrgetter("ispkg")):
        path = os.path.join(folder, entry.name)
        if entry.ispkg:
            yield from _list_modules(path, f"{package}{entry.name}.")
        else:
            yield package + entry.name, f"{path}.py"
