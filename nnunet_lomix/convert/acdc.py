"""ACDC: cine MR of the heart of 100 patients, at end diastole and end systole (Bernard et al., IEEE TMI 2018).

The download is the collection of humanheart-project.creatis.insa-lyon.fr:
``database/training/patient001/patient001_frame01.nii.gz``, ``…_frame01_gt.nii.gz``, and ``Info.cfg``, which says which
frame is which. Patients 101 to 150 (``testing``), who came later, aren't used.

70 patients are for training, 10 for validation, 20 for tests. The LoMix paper names none; its repository, as those of
EMCAD and CASCADE, takes the data that MT-UNet prepared (Wang et al., ICASSP 2022), whose lists are public, as in the
repository sotiraslab/AgileFormer (``lists/lists_ACDC``). They are by patient.
"""

from collections.abc import Iterable
from pathlib import Path

from nnunet_lomix.convert.common import (
    Case,
    Download,
    check_grids,
    copy_volume,
    find_folder,
    find_volume,
    relabel,
    require_files,
)
from nnunet_lomix.errors import LoMixError

PATIENTS = range(1, 101)
TEST = (2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95)
VAL = (19, 21, 29, 33, 41, 50, 61, 71, 76, 80)
CLASSES = ("right ventricle", "myocardium", "left ventricle")
PHASES = ("ED", "ES")  # end diastole, end systole


def find(source: Path) -> Download:
    """The download in a folder: any from ``ACDC`` down to ``training``, with or without ``database`` between.

    Raises:
        LoMixError: it isn't there or not whole.
    """
    folder = find_folder(source, "patient001", "folders patient001 to patient100")
    require_files(folder, (folder / f"patient{patient:03}/Info.cfg" for patient in PATIENTS))
    cases = {}
    for patient in PATIENTS:
        name = f"patient{patient:03}"
        for phase, frame in read_phases(folder / name / "Info.cfg").items():
            path = folder / name / f"{name}_frame{frame:02}"
            labels = path.with_name(f"{path.name}_gt")
            cases[f"{name}_{phase}"] = Case(find_volume(path), find_volume(labels))
    require_files(folder, (file for case in cases.values() for file in case))
    return Download(
        name="ACDC",
        number=602,
        channels=["cineMRI"],
        classes=CLASSES,
        ending=".nii.gz",
        cases=cases,
        train=_name_cases(patient for patient in PATIENTS if patient not in TEST + VAL),
        test=_name_cases(TEST),
        val=_name_cases(VAL),
        write_image=copy_volume,
        write_labels=relabel(range(len(CLASSES) + 1)),
        notes=check_grids(cases.values()),
    )


def _name_cases(patients: Iterable[int]) -> list[str]:
    return [f"patient{patient:03}_{phase}" for patient in patients for phase in PHASES]


def read_phases(file: Path) -> dict[str, int]:
    """The number of the frame of each phase, from a patient's ``Info.cfg``: lines as ``ED: 1``.

    Raises:
        LoMixError: it doesn't say so.
    """
    entries = (line.partition(":") for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines())
    values = {key.strip(): value.strip() for key, _, value in entries}
    try:
        return {phase: int(values[phase]) for phase in PHASES}
    except (KeyError, ValueError):
        raise LoMixError(
            f"{file} doesn't say which frames are ED and ES, in lines as ED: 1: repeat the download."
        ) from None
