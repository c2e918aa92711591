"""A model trained with LoMix, for people who have only nnU-Net: the same network under nnUNetTrainer's name."""

import contextlib
import hashlib
import io
import json
import platform
import pydoc
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from rich.console import Console

from nnunet_lomix.checkpoints import STATE, read_checkpoint

STOCK = nnUNetTrainer.__name__
DESCRIPTIONS = ("dataset.json", "plans.json", "dataset_fingerprint.json")
FINAL, BEST = "checkpoint_final.pth", "checkpoint_best.pth"
# nnUNetv2_export_model_to_zip wants these, too
FOLD_EXTRAS = ("progress.png", "validation/summary.json")
PROVENANCE = "provenance.txt"


class ExportError(click.ClickException):
    """Why a model isn't exported, in one sentence."""


def export_model(
    results: str | Path, out: str | Path, images: Sequence[str] = (), console: Console | None = None
) -> Path:
    """Write ``out/DATASET/nnUNetTrainer__PLANS__CONFIGURATION``, whole or not at all.

    Args:
        results: folder of a trainer, with plans.json and the folds.
        out: folder to make.
        images: an image of each case by which both models are compared; its other channels are found beside it.
        console: where the outcome is printed.

    Returns:
        The folder of the exported model.

    Raises:
        click.ClickException: something is missing, the network isn't nnUNetTrainer's, a checkpoint can't be trusted, or
            the models differ.
    """
    console = console or Console()
    results, out = Path(results).resolve(), Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} is {'there and not empty' if out.is_dir() else 'a file'}: choose another --out.")
    dataset_json = _read_json(results / "dataset.json", "file_ending", "channel_names", "labels")
    plans = _read_json(results / "plans.json", "dataset_name", "plans_name", "configurations")
    files = find_checkpoints(results)
    cases = {name: read_case(plans, channels) for name, channels in find_cases(images, dataset_json).items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as temporary:
            made = Path(temporary, "model")
            relative = _write_model(results, files, plans, dataset_json, made)
            for name, case in cases.items():
                agreement = compare_predictions(results, made / relative, _fold_numbers(files), case)
                console.print(f"{name}: {agreement}", soft_wrap=True, markup=False)
            if out.exists():
                out.rmdir()
            made.rename(out)
    except OSError as error:
        raise ExportError(f"{error.filename or out}: {error.strerror}; nothing was exported.") from None
    model = out / relative
    console.print(f"Exported {', '.join(fold.name for fold in _folds(files))} to {model}", soft_wrap=True, markup=False)
    unfinished = _unfinished(results, files)
    if unfinished:
        console.print(f"Left out, as its training has not ended: {', '.join(unfinished)}", markup=False)
    lacking = [f"{fold.name}/{name}" for fold in _folds(files) for name in FOLD_EXTRAS if not (fold / name).is_file()]
    if lacking:
        console.print(
            f"For nnUNetv2_export_model_to_zip it lacks {', '.join(lacking)}: train with --val first.",
            soft_wrap=True,
            markup=False,
        )
    return model


def find_checkpoints(results: Path) -> list[Path]:
    """The final and, where they are, the best checkpoints of all folds whose training has ended.

    Raises:
        ExportError: there are none.
    """
    finals = sorted(results.glob(f"fold_*/{FINAL}"))
    if not finals:
        raise ExportError(f"{results} has no fold_X/{FINAL}: name the folder of a trainer whose training has ended.")
    return [file for final in finals for file in (final, final.with_name(BEST)) if file.is_file()]


def find_cases(images: Sequence[str], dataset_json: dict) -> dict[str, list[str]]:
    """For each case, by name, the files of all of its channels in nnU-Net's order.

    Raises:
        ExportError: an image isn't named as nnU-Net's raw images are, or a channel isn't there.
    """
    ending = dataset_json["file_ending"]
    cases = {}
    for image in map(Path, images):
        name = re.fullmatch(rf"(.+)_\d{{4}}{re.escape(ending)}", image.name)
        if not name:
            raise ExportError(f"{image} is not named as nnU-Net's images are, CASE_0000{ending}: rename it.")
        channels = [image.with_name(f"{name[1]}_{i:04}{ending}") for i in range(len(dataset_json["channel_names"]))]
        for file in channels:
            if not file.is_file():
                raise ExportError(f"{file} isn't there, and the model needs this channel of {name[1]}.")
        cases[name[1]] = [str(file) for file in channels]
    return cases


def read_case(plans: dict, channels: list[str]) -> tuple[np.ndarray, dict]:
    """The image of a case and its properties, by nnU-Net's reader.

    Raises:
        ExportError: it can't be read.
    """
    try:
        return PlansManager(plans).image_reader_writer_class().read_images(channels)
    except Exception as error:  # the libraries below the readers raise anything
        raise ExportError(f"nnU-Net can't read {', '.join(channels)}: {str(error).splitlines()[0]}") from None


def check_network(checkpoint: dict, plans: dict, dataset_json: dict) -> str:
    """Check that nnUNetTrainer builds the network of the checkpoint from the plans; tells what could be checked.

    Raises:
        ExportError: it doesn't.
    """
    name, manager = checkpoint["trainer_name"], PlansManager(plans)
    trained = checkpoint["init_args"].get("configuration")
    if trained not in manager.available_configurations:
        raise ExportError(f"plans.json has no configuration {trained!r}, which is the one of the checkpoint.")
    configuration = manager.get_configuration(trained)
    refusal = f"The network of {name} is not the one that {STOCK} builds from the plans, so nnU-Net alone can't use it"
    # nnU-Net imports and calls what the plans name: others have nothing beyond what nnU-Net brings, and a stranger's
    # plans must not name a function that runs commands
    kwargs = configuration.network_arch_init_kwargs
    imported = [kwargs.get(key) for key in configuration.network_arch_init_kwargs_req_import]
    for part in [configuration.network_arch_class_name, *(p for p in imported if p is not None)]:
        if not _is_module(part):
            raise ExportError(f"{refusal}: {part} is not part of nnU-Net.")
    trainer = _find_trainer(name)
    # layers without weights, a different activation say, don't show in the checkpoint
    if trainer and trainer.build_network_architecture is not nnUNetTrainer.build_network_architecture:
        raise ExportError(f"{refusal}: {name} has its own build_network_architecture.")
    network = nnUNetTrainer.build_network_architecture(
        manager,
        configuration,
        determine_num_input_channels(manager, configuration, dataset_json),
        manager.get_label_manager(dataset_json).num_segmentation_heads,
        enable_deep_supervision=False,
    )
    try:
        network.load_state_dict(checkpoint["network_weights"], strict=True)
    except RuntimeError:  # its text lists every weight
        raise ExportError(f"{refusal}: their weights differ in name or shape.") from None
    return "its class and its weights" if trainer else f"its weights only, since {name} isn't installed here"


def _is_module(name: str) -> bool:
    """Whether it is a class of layers or networks that nnU-Net brings."""
    if not isinstance(name, str) or not name.startswith(("torch.nn.", "dynamic_network_architectures.")):
        return False
    found = pydoc.locate(name)
    return isinstance(found, type) and issubclass(found, torch.nn.Module)


def compare_predictions(original: Path, exported: Path, folds: tuple, case: tuple[np.ndarray, dict]) -> str:
    """Predict a case with all folds of both models, as nnUNetv2_predict does, on the CPU, where it repeats exactly.

    Args:
        original, exported: folders of the models.
        folds: numbers, or ``"all"``.
        case: as from :func:`read_case`.

    Returns:
        That they agree bit for bit, and in how much.

    Raises:
        ExportError: they don't agree, or one of them can't predict.
    """
    segmentation, probabilities = _predict(original, folds, case)
    other_segmentation, other_probabilities = _predict(exported, folds, case)
    if not (
        np.array_equal(segmentation, other_segmentation) and probabilities.tobytes() == other_probabilities.tobytes()
    ):
        raise ExportError("The predictions of the original and the exported model differ: nothing was exported.")
    shape = " x ".join(map(str, segmentation.shape))
    return f"same segmentation ({shape}) and same probabilities ({probabilities.size} values), bit for bit"


def _predict(model: Path, folds: tuple, case: tuple[np.ndarray, dict]) -> tuple[np.ndarray, np.ndarray]:
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        try:
            predictor.initialize_from_trained_model_folder(str(model), folds, FINAL)
        except (RuntimeError, SystemExit) as error:  # the trainer isn't installed here
            raise ExportError(f"nnU-Net can't load {model}: {error}") from None
        if predictor.configuration_manager.previous_stage_name is not None:
            raise ExportError("The second stage of a cascade can't predict an image alone: export without --case.")
        return predictor.predict_single_npy_array(*deepcopy(case), save_or_return_probabilities=True)


def _write_model(results: Path, files: list[Path], plans: dict, dataset_json: dict, made: Path) -> Path:
    """Write the model below ``made``; returns its folder relative to that."""
    relative, entries = None, []
    for file in files:
        checkpoint = read_checkpoint(file)
        checked = check_network(checkpoint, plans, dataset_json)
        if relative is None:
            relative = _model_folder(plans, checkpoint["init_args"]["configuration"])
        entries.append(f"{_describe(file, checkpoint)}; network compared with {STOCK}'s by {checked}")
        target = made / relative / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save({k: v for k, v in checkpoint.items() if k != STATE} | {"trainer_name": STOCK}, target)
        except RuntimeError as error:  # torch's for a full disk
            raise OSError(0, str(error).splitlines()[0], str(made)) from None
    copied = [results / name for name in DESCRIPTIONS]
    copied += [fold / name for fold in _folds(files) for name in FOLD_EXTRAS]
    for file in filter(Path.is_file, copied):
        target = made / relative / file.relative_to(results)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    (made / relative / PROVENANCE).write_text(_provenance(results, files, entries))
    return relative


def _model_folder(plans: dict, configuration: str) -> Path:
    """Where nnU-Net's trainer would write it, below its results; a stranger's names lead to no other place.

    Raises:
        ExportError: a name isn't one of nnU-Net's.
    """
    dataset, plans_name = plans["dataset_name"], plans["plans_name"]
    if not re.fullmatch(r"Dataset\d{3,}_[^/\\]+", dataset) or re.search(r"[/\\]", plans_name + configuration):
        raise ExportError(f"{dataset}, {plans_name} and {configuration} in plans.json can't be names of folders.")
    return Path(dataset, f"{STOCK}__{plans_name}__{configuration}")


def _folds(files: list[Path]) -> list[Path]:
    return list(dict.fromkeys(file.parent for file in files))


def _fold_numbers(files: list[Path]) -> tuple[int | str, ...]:
    names = [fold.name.removeprefix("fold_") for fold in _folds(files)]
    return tuple(int(name) if name.isdecimal() else name for name in names)


def _unfinished(results: Path, files: list[Path]) -> list[str]:
    return sorted(folder.name for folder in set(results.glob("fold_*/")) - set(_folds(files)))


def _find_trainer(name: str) -> type | None:
    """The class by nnU-Net's own look-up; None if it isn't installed here."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return recursive_find_trainer_class_by_name(name)
    except (Exception, SystemExit):  # whatever a module of the user raises when it is imported
        return None


def _read_json(file: Path, *keys: str) -> dict:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ExportError(f"{file} isn't there: name the folder TRAINER__PLANS__CONFIGURATION.") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{file} can't be read: {error}.") from None
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise ExportError(f"{file} is not nnU-Net's: it lacks one of {', '.join(keys)}.")
    return content


def _describe(file: Path, checkpoint: dict) -> str:
    state = checkpoint.get(STATE)
    learned = "no LoMix state"
    if state is not None:
        maps = next((epoch for epoch in reversed(state["history"]) if epoch), {})
        learned = f"LoMix, weighting rule {state['rule']}, {len(maps)} supervised maps"
    return (
        f"{file.parent.name}/{file.name}: {checkpoint['trainer_name']}, {checkpoint['current_epoch']} epochs, {learned}"
    )


def _provenance(results: Path, files: list[Path], entries: list[str]) -> str:
    sources = [results / name for name in DESCRIPTIONS if (results / name).is_file()] + files
    hashes = "\n".join(f"{_sha256(file)}  {file.relative_to(results)}" for file in sources)
    versions = ", ".join(f"{name} {version(name)}" for name in ("nnunet_lomix", "nnunetv2", "torch"))
    unfinished = _unfinished(results, files)
    left_out = f"Left out, as its training had not ended: {', '.join(unfinished)}\n" if unfinished else ""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        f"Exported from {results.name} on {now}\n"
        f"by {versions}, Python {platform.python_version()}.\n\n"
        "How the weights were learned:\n" + "\n".join(entries) + f"\n{left_out}\n"
        "LoMix is a loss: it mixes and supervises the outputs of all decoder scales during training. The network is\n"
        f"that of {STOCK}, and so are the name and all keys of these checkpoints; the loss's state was left out.\n\n"
        f"SHA-256 of the files it was made from:\n{hashes}\n"
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
