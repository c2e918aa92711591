"""Public datasets of the LoMix paper, from their downloads' own layouts to nnU-Net's raw format, with its splits.

- ``synapse``, ``acdc``, ``polyp``: what each download must have, and who is trained and tested on;
- ``common``: finding and checking a download, and its volumes;
- here: the datasets and their folds.

All labelled cases become training cases of nnU-Net, and ``splits_final.json`` says who is who:

- fold 0: the paper's training cases against its test cases. nnU-Net validates them after the training, by the last
  checkpoint, so ``nnunet_lomix compare`` of this fold is the paper's comparison;
- fold 1, where the paper has validation cases: the training cases against those, for whoever chooses settings;
- three more: 5 % of the training cases, drawn at random, against the test cases.
"""

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import track

from nnunet_lomix.convert import acdc, polyp, synapse
from nnunet_lomix.convert.common import Download
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.files import building
from nnunet_lomix.nnunet.datasets import (
    VARIABLES,
    Split,
    find_root,
    name_image,
    require_root,
    require_utf8,
    write_splits,
)
from nnunet_lomix.nnunet.results import DATASET_JSON
from nnunet_lomix.splits import append_scarce, tabulate_folds

DATASETS: dict[str, Callable[[Path], Download]] = {"synapse": synapse.find, "acdc": acdc.find, "polyp": polyp.find}
FRACTION = 0.05  # of the training cases, in the data-scarce folds
SEEDS = 3


def convert(kind: str, source: str | Path, number: int | None = None, console: Console | None = None) -> Path:
    """Write a dataset in nnU-Net's raw format, and its folds where nnU-Net looks for them.

    A fold file that is in ``nnUNet_preprocessed`` before planning is kept by nnU-Net, so it is written there, too. Both
    folders appear once they are whole; the source is only read.

    Args:
        kind: of :data:`DATASETS`.
        source: the unpacked download.
        number: of the dataset; by default 601 for Synapse, 602 for ACDC, 603 for polyps.
        console: where to print what was made, and what comes next.

    Returns:
        The raw dataset.

    Raises:
        LoMixError: the download is not whole or not as it should be, the number is taken, or nnU-Net's variables are
            not set.
    """
    console, source = console or Console(), Path(source)
    raw, preprocessed = require_root("nnUNet_raw"), require_root("nnUNet_preprocessed")
    require_utf8(source)
    if not source.is_dir():
        raise LoMixError(f"{source} is not a folder: unpack the download, and give the folder that comes out.")
    download = DATASETS[kind](source)
    number = download.number if number is None else number
    roots = [root for root in map(find_root, VARIABLES) if root is not None]
    taken = [folder for root in roots for folder in sorted(root.glob(f"Dataset{number:03}_*"))]
    if taken:
        raise LoMixError(f"There is a dataset {number}, {taken[0]}: give another number by -d, or remove that one.")
    name = f"Dataset{number:03}_{download.name}"
    splits, meanings = make_splits(download)
    with building(raw / name) as folder, building(preprocessed / name) as beside:
        _write(download, folder, console)
        write_splits(folder, splits)
        write_splits(beside, splits)
    console.print(tabulate_folds(splits, meanings))
    for line in (
        *download.notes,
        f"{len(download.cases)} cases are in {raw / name}. Next:",
        f"nnUNetv2_plan_and_preprocess -d {number} --verify_dataset_integrity",
        f"nnunet_lomix run -d {number} -c 2d -f 0 -tr nnUNetTrainer nnUNetTrainerLoMix",
    ):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    return raw / name


def make_splits(download: Download) -> tuple[list[Split], list[str]]:
    """The folds of a download, and what each of them is."""
    folds = [Split(train=download.train, val=download.test)]
    meanings = ["all training cases, against the test cases"]
    if download.val:
        folds.append(Split(train=download.train, val=download.val))
        meanings.append("all training cases, against the validation cases")
    count = max(1, int(FRACTION * len(download.train) + 0.5))
    folds, drawn = append_scarce(folds, 0, count, SEEDS)
    seeds = (", ".join(map(str, of_fold)) for of_fold in drawn.values())
    meanings += [f"{100 * FRACTION:g} % of them, seed {listed}, against the test cases" for listed in seeds]
    return folds, meanings


def _write(download: Download, folder: Path, console: Console) -> None:
    images, labels = folder / "imagesTr", folder / "labelsTr"
    images.mkdir()
    labels.mkdir()
    for case, files in track(download.cases.items(), "Converting", console=console, transient=True):
        download.write_image(files.image, images / name_image(case, 0, download.ending))
        download.write_labels(files.labels, labels / f"{case}{download.ending}")
    description = {
        "channel_names": dict(enumerate(download.channels)),
        "labels": {"background": 0} | {name: value for value, name in enumerate(download.classes, 1)},
        "numTraining": len(download.cases),
        "file_ending": download.ending,
    }
    (folder / DATASET_JSON).write_text(json.dumps(description, indent=4))
