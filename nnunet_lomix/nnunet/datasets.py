"""Datasets: nnU-Net's environment variables, names and folders, and ``splits_final.json``."""

import json
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TypedDict

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.files import replacing

SPLITS = "splits_final.json"
VARIABLES = {v.env_var_name: v for v in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results)}


class Split(TypedDict):
    """A fold of ``splits_final.json``: names of cases."""

    train: list[str]
    val: list[str]


def find_root(variable: str) -> Path | None:
    """The folder that ``nnUNet_raw``, ``nnUNet_preprocessed`` or ``nnUNet_results`` names; None if it is not set.

    Raises:
        LoMixError: it begins with ``~``, which nnU-Net would take for the name of a folder.
    """
    if not VARIABLES[variable].is_set():
        return None
    root = Path(VARIABLES[variable])
    if str(root).startswith("~"):
        raise LoMixError(f"{variable} is {str(root)!r}, but nnU-Net needs the whole path: export it without quotes.")
    return root


def require_root(variable: str) -> Path:
    """As :func:`find_root`, but it raises a :class:`LoMixError`, too, if the variable is not set."""
    root = find_root(variable)
    if root is None:
        raise LoMixError(
            f"The environment variable {variable} is not set: export {variable}=/your/folder first, the one that "
            "nnU-Net uses."
        )
    return root


def name_dataset(
    dataset: str,
    check: str = "-d, nnUNet_preprocessed, nnUNet_raw and nnUNet_results",
    results: Iterable[str | Path] = (),
) -> str:
    """The name of a dataset, by number or name.

    Args:
        dataset: number or name.
        check: what the user should look at if there is no such dataset, for the message.
        results: further results folders, where a name may be.

    Raises:
        LoMixError: there is no dataset of this number or name, or there are several.
    """
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except ValueError:
        raise LoMixError(
            f"{dataset!r} is neither the number nor the name of a dataset{suggest_dataset(dataset)}"
        ) from None
    except RuntimeError as error:  # its first sentence says which
        raise LoMixError(f"{str(error).split('. ')[0]}: check {check}.") from None
    elsewhere = any(Path(folder, name).is_dir() for folder in results)
    if not elsewhere and not any(find_part(name, "", variable) for variable in VARIABLES):
        raise LoMixError(f"Could not find a dataset {name}: check {check}{suggest_dataset(name)}")
    return name


def require_preprocessed(dataset: str) -> Path:
    """The folder of a dataset, by number or name, in ``nnUNet_preprocessed``.

    Raises:
        LoMixError: the variable is not set, or there is no such folder.
    """
    root = require_root("nnUNet_preprocessed")
    name = name_dataset(dataset, "-d and nnUNet_preprocessed")
    if not (root / name).is_dir():
        raise LoMixError(
            f"{name} is not in nnUNet_preprocessed ({root}): run nnUNetv2_plan_and_preprocess for it first"
            f"{suggest_dataset(name)}"
        )
    return root / name


def suggest_dataset(name: str) -> str:
    """The end of a message about a name that isn't found: which datasets it may mean, if some are called alike."""
    roots = [root for root in map(find_root, VARIABLES) if root is not None]
    there = sorted({folder.name for root in roots for folder in root.glob("Dataset*")} - {name})
    close = [other for other in there if name.lower() in other.lower()] or get_close_matches(name, there, 3, 0.7)
    return f"; did you mean {' or '.join(close[:3])}?" if close else "."


def find_part(dataset: str, part: str, variable: str = "nnUNet_raw") -> Path | None:
    """A folder of a dataset, by its name: ``imagesTr``, ``labelsTr``, …, "" for its own; None if it isn't there."""
    root = find_root(variable)
    return root / dataset / part if root is not None and (root / dataset / part).is_dir() else None


def require_references(dataset: str) -> Path:
    """The segmentations that nnU-Net validates against, or the raw labels, of which they are a copy; by its name.

    Raises:
        LoMixError: neither is there.
    """
    copied, raw = "gt_segmentations", "labelsTr"
    folder = find_part(dataset, copied, "nnUNet_preprocessed") or find_part(dataset, raw)
    if folder is None:
        raise LoMixError(
            f"There are no references: neither {dataset}/{copied} in nnUNet_preprocessed nor {dataset}/{raw} in "
            "nnUNet_raw; set these variables."
        )
    return folder


def list_cases(folder: Path, ending: str) -> dict[str, Path]:
    """The files of a folder with an ending that aren't hidden, by case, sorted."""
    files = (file for file in sorted(folder.glob("*")) if file.name.endswith(ending) and not is_hidden(file))
    return {file.name.removesuffix(ending): file for file in files}


def is_hidden(file: Path) -> bool:
    """Whether the name begins with a dot: macOS leaves such a file beside each one that it copies."""
    return file.name.startswith(".")


def require_utf8(file: str | Path) -> None:
    """Refuse a name of a file that isn't UTF-8, as Linux allows.

    SimpleITK, by which nnU-Net reads, ends the whole process there, and no report could hold such a name.

    Raises:
        LoMixError: it isn't.
    """
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise LoMixError(f"The name of {file} is not UTF-8: rename it.") from None


def name_image(case: str, channel: int, ending: str) -> str:
    """The file name of a channel of a case.

    >>> name_image("liver_007", 1, ".nii.gz")
    'liver_007_0001.nii.gz'
    """
    return f"{case}_{channel:04}{ending}"


def read_splits(folder: Path) -> list[Split]:
    """The folds of the dataset with this folder in ``nnUNet_preprocessed``.

    Raises:
        LoMixError: its ``splits_final.json`` can't be read, or isn't nnU-Net's.
    """
    file = folder / SPLITS
    try:
        splits = json.loads(file.read_text(encoding="utf-8-sig"))
        for cases in (fold[part] for fold in splits for part in ("train", "val")):
            if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
                raise TypeError
    except OSError as error:
        raise LoMixError(f"{file} can't be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LoMixError(f"{file} is not a list of folds, each with train and val: mend or remove it.") from None
    return list(splits)


def write_splits(folder: Path, splits: list[Split]) -> None:
    """Write ``splits_final.json``, whole or not at all; ``folder`` as for :func:`read_splits`.

    Raises:
        OSError: it can't be written.
    """
    with replacing(folder / SPLITS) as temporary:
        temporary.write_text(json.dumps(splits, indent=4))


def default_splits(folder: Path) -> list[Split]:
    """What nnU-Net itself would write when a training finds no ``splits_final.json``.

    Args:
        folder: of the dataset in ``nnUNet_preprocessed``.

    Raises:
        LoMixError: nothing is preprocessed, configurations have different cases, or there are fewer than 5.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class  # slow to import
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    # each case has one file with its properties in the folder of each configuration
    found = {}
    for configuration in sorted({file.parent for file in folder.glob("*/*.pkl") if not is_hidden(file)}):
        cases = infer_dataset_class(str(configuration)).get_identifiers(str(configuration))
        found[configuration.name] = sorted(case for case in cases if not case.startswith("."))
    if not found:
        raise LoMixError(f"{folder} has no preprocessed cases: run nnUNetv2_preprocess first.")
    cases, *others = found.values()
    if any(other != cases for other in others):
        counts = ", ".join(f"{name} {len(cases)}" for name, cases in found.items())
        raise LoMixError(f"{folder} has different cases by configuration ({counts}): preprocess again.")
    if len(cases) < 5:
        raise LoMixError(f"{folder} has {len(cases)} cases: nnU-Net's split into 5 folds needs 5.")
    # numpy's strings become Python's, as JSON wants them
    return [
        Split(train=[*map(str, fold["train"])], val=[*map(str, fold["val"])])
        for fold in generate_crossval_split(cases, seed=12345, n_splits=5)
    ]
