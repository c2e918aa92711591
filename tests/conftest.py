"""Generated datasets in nnU-Net's format, and nnU-Net's own commands on them."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from fasteners import InterProcessLock
from hypothesis import settings
from scipy.ndimage import gaussian_filter

from nnunet_lomix.errors import LoMixError
from nnunet_lomix.nnunet.commands import folders_below, run_command

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")

CASES = [f"case_{i}" for i in range(6)]  # the last one is held out
SHAPE = (20, 32, 32)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported: then Triton's interpreter runs them

EXTERNAL_TRAINERS = Path(__file__).parent / "trainers" / "external_trainers"
LABELS = {
    "classes": {"background": 0, "large": 1, "small": 2},
    "ignore": {"background": 0, "large": 1, "small": 2, "ignore": 3},
    "regions_ignore": {"background": 0, "all": [1, 2], "small": 2, "ignore": 3},
}
CONFIGURATIONS = {  # those that are trained
    "classes": ["2d", "3d_fullres"],
    "regions_ignore": ["3d_fullres"],
}
UNVALIDATED = {"TINY_VALIDATION": "0"}  # nnU-Net's validation starts two processes, which takes longer than training


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """The files with long tests come first: so two workers end at about the same time."""
    long = {item.path for item in items if item.get_closest_marker("end_to_end")}
    items.sort(key=lambda item: item.path not in long)


@dataclass
class NnUNet:
    """nnU-Net's three folders below one, and its commands."""

    folder: Path
    plans: str = "nnUNetPlans"
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.raw, self.preprocessed, self.results = (self.folder / name for name in ("raw", "preprocessed", "results"))
        self.variables = {
            **folders_below(self.folder),
            "nnUNet_extTrainer": str(EXTERNAL_TRAINERS),
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, command: str, *args, fails=False, **variables) -> str:
        """Run a command of this environment in an unrelated working directory; returns all that it printed."""
        log = self.folder / "output.log"
        failed = False
        try:
            run_command([command, *args], log, {**self.variables, **variables}, self.folder)
        except LoMixError:
            failed = True
        output = log.read_text(errors="replace")
        assert failed == fails, f"{command} {args}\n{output[-5000:]}"
        return output

    def train(self, dataset: int, configuration: str, *args, **kwargs) -> str:
        trainer = [] if "-tr" in args else ["-tr", "nnUNetTrainerLoMixTiny"]
        return self.run(
            "nnUNetv2_train", dataset, configuration, 0, *trainer, "-p", self.plans, *args, "-device", "cpu", **kwargs
        )

    def model(self, configuration: str, trainer="nnUNetTrainerLoMixTiny") -> Path:
        (folder,) = self.results.glob(f"*/{trainer}__{self.plans}__{configuration}")
        return folder


def write_dataset(raw: Path, number: int, labels: str) -> Path:
    """A raw dataset of 5 cases and a held-out one: a bright blob within a bright ball, in noise."""
    folder = raw / f"Dataset{number}_{labels}"
    for sub in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / sub).mkdir(parents=True)
    for i, case in enumerate(CASES):
        rng = np.random.default_rng(i)
        grid = np.indices(SHAPE).T - (np.array(SHAPE) / 2 + rng.uniform(-2, 2, 3))
        radius = np.linalg.norm(grid, axis=-1).T
        seg = (radius < 8).astype(np.uint8) + (radius < 4)
        image = gaussian_filter(seg + rng.normal(0, 0.5, SHAPE), 0.5).astype(np.float32)
        if "ignore" in labels:
            seg[:, :6] = 3
        write_image(image, folder / ("imagesTs" if case == CASES[-1] else "imagesTr") / f"{case}_0000.nii.gz")
        if case != CASES[-1]:
            write_image(seg, folder / "labelsTr" / f"{case}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": LABELS[labels],
        "numTraining": len(CASES) - 1,
        "file_ending": ".nii.gz",
        **({"regions_class_order": [1, 2]} if "regions" in labels else {}),
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def write_image(array: np.ndarray, path: Path):
    sitk.WriteImage(sitk.GetImageFromArray(array), path)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, worker_id):
    """Makes a planned and preprocessed dataset, once for each kind of labels; gives its own NnUNet."""
    of_all_workers = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        of_all_workers = of_all_workers.parent

    def prepare(labels: str) -> NnUNet:
        residual_encoder = "regions" in labels
        nnunet = NnUNet(of_all_workers / labels, "nnUNetResEncUNetMPlans" if residual_encoder else "nnUNetPlans")
        with InterProcessLock(of_all_workers / f"{labels}.lock"):
            if not (of_all_workers / f"{labels}.done").exists():
                planner = "nnUNetPlannerResEncM" if residual_encoder else "ExperimentPlanner"
                write_dataset(nnunet.raw, 701, labels)
                configurations = CONFIGURATIONS[labels]
                processes = ("-npfp", 1, "-np", *[1] * len(configurations))
                # the planner sets as many torch threads as there are augmentation workers, so 0 isn't possible here
                nnunet.run("nnUNetv2_plan_and_preprocess", "-d", 701, "-pl", planner, "-c", *configurations, *processes,
                           nnUNet_n_proc_DA="1")  # fmt: skip
                (of_all_workers / f"{labels}.done").touch()
        return nnunet

    return prepare


@pytest.fixture
def own_results(prepared, tmp_path):
    """A prepared dataset with a results folder of the test's own."""

    def prepare(labels: str) -> NnUNet:
        shared = prepared(labels)
        nnunet = NnUNet(tmp_path, shared.plans)
        for name in ("raw", "preprocessed"):
            os.symlink(getattr(shared, name), getattr(nnunet, name))
        return nnunet

    return prepare


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device at hand, CUDA or the CPU: what can be told apart by a device is tested on it."""
    return DEVICE


@pytest.fixture
def poisoned_memory():
    """Memory that PyTorch hands out is NaN, so a sum into a buffer that was never zeroed is found."""
    # fills uninitialised memory, too; on a GPU it would refuse the resampling
    torch.use_deterministic_algorithms(DEVICE.type == "cpu")
    yield
    torch.use_deterministic_algorithms(False)
