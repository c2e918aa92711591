"""What is compared, from plain folders of segmentations."""

from collections.abc import Sequence
from pathlib import Path

from joblib import Parallel, delayed

from nnunet_lomix.compare.segmentations import find_reader, guess_ending, list_values
from nnunet_lomix.compare.sources import (
    Labels,
    Source,
    find_spacings,
    list_images,
    list_labels,
    match_cases,
    name_trainings,
    pick_references,
    require_equal,
    require_folders,
    require_one_name_each,
    shorten,
)
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.datasets import list_cases, name_image
from nnunet_lomix.nnunet.results import DATASET_JSON, read_dataset_json


def read_folders(
    references: str | Path,
    folders: Sequence[str | Path],
    names: Sequence[str] = (),
    intersection: bool = False,
    jobs: int = 1,
    images: str | Path | None = None,
) -> Source:
    """Folders of predictions, with a folder of references whose files are named alike.

    Labels are those of dataset.json, beside predictions or references; without it, all values of the references.

    Args:
        references: folder.
        folders: of predictions, those of the reference trainer first.
        names: of the trainers; those of one name are its seeds. By default as of :func:`name_folders`, no seeds.
        intersection: compare the cases that all have, instead of refusing others.
        jobs: number of processes that look for values, without dataset.json.
        images: folder with the images of the cases, named as nnU-Net's, for the pictures.

    Raises:
        LoMixError: something is missing, or cases or labels differ.
        UsageError: names and folders don't fit together.
    """
    reference_folder, prediction_folders = Path(references), [Path(folder) for folder in folders]
    require_folders([reference_folder, *prediction_folders], "check --references and --predictions")
    require_folders([Path(images)] if images else [], "check --images")
    require_one_name_each(prediction_folders, names, "--predictions")
    trainings = name_trainings(prediction_folders, names or name_folders(prediction_folders))

    # the dataset.json of a raw or preprocessed dataset lies above the references
    looked_in = [*prediction_folders, reference_folder, reference_folder.parent]
    described = {f: read_dataset_json(f) for f in looked_in if (f / DATASET_JSON).exists()}
    if described:
        ending = require_equal({folder: own["file_ending"] for folder, own in described.items()}, "file ending")
    else:
        ending = guess_ending(reference_folder)
    predictions, notes = match_cases(
        {training: list_cases(folder, ending) for training, folder in trainings.items()}, trainings, intersection
    )
    files = pick_references(reference_folder, ending, next(iter(predictions.values())))
    dataset_json = next(iter(described.values()), {"file_ending": ending})
    reader = find_reader(dataset_json, example=next(iter(files.values())))
    if described:
        labels = require_equal({folder: list_labels(folder, own) for folder, own in described.items()}, "labels")
        label_source = shorten(folder / DATASET_JSON for folder in described)
    else:
        found = Parallel(min(jobs, len(files)))(delayed(list_values)(file, reader) for file in files.values())
        labels = Labels({str(value): (value,) for value in sorted(set().union(*found) - {0})}, ignore=None)
        label_source = "all values of the references, as there is no dataset.json"
    if not labels.classes:
        raise LoMixError(f"{reference_folder} has nothing but background to compare: the labels are {label_source}.")
    return Source(
        references=files,
        predictions=predictions,
        folders=trainings,
        labels=labels.classes,
        ignore=labels.ignore,
        reader=reader,
        dataset=str(reference_folder),
        label_source=label_source,
        notes=notes,
        images=_require_images(Path(images), ending, list(files)) if images else {},
        spacings=find_spacings(files, predictions.values(), reader),
    )


def name_folders(folders: Sequence[Path]) -> list[str]:
    """What tells folders apart: the shortest ends of their paths that differ, without the last parts that all share.

    Folders that are called alike may hold anything, so they never get one name, but for a folder that is given twice.

    >>> name_folders([Path("/data/before"), Path("/data/after")])
    ['before', 'after']
    >>> name_folders([Path("/runs/A/fold_0/validation"), Path("/runs/B/fold_0/validation")])
    ['A', 'B']
    >>> name_folders([Path("/runs/A/preds"), Path("/runs/B/preds"), Path("/ens")])
    ['A/preds', 'B/preds', 'ens']
    """
    paths = [folder.resolve().parts for folder in folders]
    different = set(paths)
    while min(map(len, different)) > 1 and len({path[-1] for path in different}) == 1 < len(different):
        paths = [path[:-1] for path in paths]
        different = set(paths)
    names = []
    for path in paths:
        # one part if no other path ends alike; the whole path is always enough
        length = next(n for n in range(1, len(path) + 1) if sum(p[-n:] == path[-n:] for p in different) == 1)
        names.append("/".join(path[-length:]))
    return names


def _require_images(folder: Path, ending: str, cases: Sequence[str]) -> dict[str, Path]:
    files = list_images(folder, ending, cases)
    missing = [name_image(case, 0, ending) for case in cases if case not in files]
    if missing:
        raise LoMixError(f"{folder} has no {shorten(missing)}: name the folder of all images, or none.")
    return files
