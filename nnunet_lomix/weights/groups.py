"""Which folds are shown together: those of one model, but folds with few training cases apart from the others."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.datasets import SPLITS, Split, find_part, read_splits, require_utf8
from nnunet_lomix.nnunet.results import FoldFolder, ModelFolder
from nnunet_lomix.splits import is_part
from nnunet_lomix.weights.history import parse_map, read_history
from nnunet_lomix.weights.summary import Group


def read_groups(folders: Sequence[str | Path]) -> tuple[list[Group], list[str]]:
    """The weights of all folds, by group, and sentences on what a reader should know of them.

    Args:
        folders: of models, for all of their folds, or of folds.

    Raises:
        LoMixError: a folder is neither a model's nor a fold's, no fold has weights, a file can't be trusted, or folds
            of a group have different maps.
    """
    read = {fold: read_history(fold) for fold in dict.fromkeys(_list_all_folds(folders))}
    left_out = ", ".join(str(fold.path) for fold, history in read.items() if history is None)
    found = {fold: history for fold, history in read.items() if history is not None}
    if not found:
        raise LoMixError(f"LoMix has not ended an epoch in {left_out}: wait for the first one, or name other folders.")
    notes = [f"Without {left_out}: LoMix has not ended an epoch there."] if left_out else []
    groups: dict[str, dict[str, pd.DataFrame]] = {}
    models = list(dict.fromkeys(fold.path.parent for fold in found))
    for model, title in zip(models, name_models(models), strict=True):
        own = [fold for fold in found if fold.path.parent == model]
        dataset = find_part(model.parent.name, "", "nnUNet_preprocessed")
        splits = read_splits(dataset) if dataset is not None and (dataset / SPLITS).is_file() else None
        # nnU-Net's own split has 5 folds; further ones come from a splits_final.json
        added = [fold.path.name for fold in own if fold.fold.isdecimal() and int(fold.fold) >= 5]
        if splits is None and 0 < len(added) < len(own):
            notes.append(
                f"{title} is one column, though {', '.join(added)} may have fewer training cases than the other folds: "
                f"set nnUNet_preprocessed, in which {model.parent.name}/{SPLITS} says how many."
            )
        for fold in own:
            groups.setdefault(title + _describe_cases(fold, splits or []), {})[fold.path.name] = found[fold]
    made = []
    for name, histories in groups.items():
        first, *others = histories.values()
        if any(set(other) != set(first) for other in others):
            raise LoMixError(f"{' and '.join(histories)} of {name} have different maps: show them one by one.")
        made.append(Group(name, histories, list(filter(None, map(parse_map, first)))))
    return made, notes


def _list_all_folds(folders: Sequence[str | Path]) -> Iterator[FoldFolder]:
    for folder in folders:
        path = Path(folder).resolve()
        require_utf8(path)
        own = [FoldFolder(path)] if path.name.startswith("fold_") else ModelFolder(path).folds()
        if not own:
            raise LoMixError(f"{path} has no fold_X in it: name the folder of a trainer, or of a fold.")
        yield from own


def name_models(models: Sequence[Path]) -> list[str]:
    """Names for model folders: their trainers, or what tells their paths apart.

    >>> name_models([Path("/r/D/A__P__2d"), Path("/r/D/B__P__2d")])
    ['A', 'B']
    >>> name_models([Path("/r/D/A__P__2d"), Path("/r/D/A__P__3d")])
    ['A__P__2d', 'A__P__3d']
    """
    trainers = [model.name.split("__")[0] for model in models]
    if len(set(trainers)) == len(models):
        return trainers
    return [os.path.relpath(model, os.path.commonpath(models)) for model in models]


def _describe_cases(fold: FoldFolder, splits: Sequence[Split]) -> str:
    """The number of training cases, if they are only a part of another fold's, as the end of a name."""
    if not fold.fold.isdecimal() or int(fold.fold) >= len(splits):
        return ""
    own = splits[int(fold.fold)]
    return f", {len(own['train'])} training cases" if any(is_part(own, other) for other in splits) else ""
