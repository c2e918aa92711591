"""Downloads as they come out of their archives, with tiny images, and what becomes of them."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_lomix.convert import convert
from nnunet_lomix.errors import LoMixError
from tests.conftest import NnUNet

SCANS = (*range(1, 11), *range(21, 41))
SHAPE = (4, 8, 8)  # z, y, x


def write_volume(file: Path, array: np.ndarray, spacing=(1.5, 1.5, 5.0), origin=(3.0, -2.0, 7.0)) -> Path:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))
    return file


def draw_labels(name: str, highest: int) -> np.ndarray:
    """All labels, and background, at places of its own for each name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = np.zeros(SHAPE, np.uint8)
    values.flat[rng.permutation(values.size)[: values.size // 2]] = np.arange(values.size // 2) % (highest + 1)
    return values


def write_synapse(folder: Path) -> Path:
    """``RawData.zip`` of syn3193805, unpacked."""
    for scan in SCANS:
        labels = draw_labels(f"scan {scan}", 13)
        image = 40 * labels.astype(np.int16) - 200
        write_volume(folder / f"RawData/Training/img/img{scan:04}.nii.gz", image)
        write_volume(folder / f"RawData/Training/label/label{scan:04}.nii.gz", labels)
    for scan in range(61, 81):  # without labels, and not in the paper
        (folder / "RawData/Testing/img").mkdir(parents=True, exist_ok=True)
        (folder / f"RawData/Testing/img/img{scan:04}.nii.gz").write_bytes(b"never read")
    return folder


def es_frame(patient: int) -> int:
    return 7 + patient % 9


def write_acdc(folder: Path) -> Path:
    """``ACDC``, unpacked."""
    for patient in range(1, 151):
        part = "training" if patient <= 100 else "testing"
        name = f"patient{patient:03}"
        own = folder / "database" / part / name
        own.mkdir(parents=True)
        frames = (1, es_frame(patient))
        info = f"ED: {frames[0]}\nES: {frames[1]}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
        (own / "Info.cfg").write_text(info)
        (own / f"{name}_4d.nii.gz").write_bytes(b"never read")
        for frame in frames if patient <= 100 else ():
            labels = draw_labels(f"{name} {frame}", 3)
            write_volume(own / f"{name}_frame{frame:02}.nii.gz", 50 * labels.astype(np.int16))
            write_volume(own / f"{name}_frame{frame:02}_gt.nii.gz", labels)
    return folder


def draw_picture(name: str, size=(12, 16)) -> tuple[np.ndarray, np.ndarray]:
    """RGB, and a mask of 0 and 255."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    mask = np.zeros(size, np.uint8)
    top, left = (rng.integers(0, n // 2) for n in size)
    mask[top : top + size[0] // 2, left : left + size[1] // 2] = 255
    picture = rng.integers(0, 200, (*size, 3), dtype=np.uint8)
    picture[mask > 0, 0] = 255
    return picture, mask


def write_layout(images: Path, masks: Path, names, ending: str, before="") -> None:
    """One picture under all these names, and its mask with something before the name."""
    for folder, pixels, prefix in zip((images, masks), draw_picture("any"), ("", before), strict=True):
        folder.mkdir(parents=True)
        first = folder / f"first{ending}"
        write_picture(first, pixels)
        for name in names:
            (folder / f"{prefix}{name}{ending}").hardlink_to(first)
        first.unlink()


def write_picture(file: Path, pixels: np.ndarray) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=pixels.ndim == 3), str(file))


def write_clinicdb(folder: Path) -> Path:
    """``CVC-ClinicDB.rar``, unpacked: each picture is another one."""
    parts = [folder / "CVC-ClinicDB" / name for name in ("Original", "Ground Truth")]
    for part in parts:
        part.mkdir(parents=True)
    for name in range(1, 613):
        for part, pixels in zip(parts, draw_picture(str(name)), strict=True):
            write_picture(part / f"{name}.tif", pixels)
    return folder


def read_all(folder: Path) -> tuple[dict, list, dict[str, np.ndarray]]:
    """``dataset.json``, the folds, and the labels of all cases."""
    description = json.loads((folder / "dataset.json").read_text())
    ending = description["file_ending"]
    labels = {
        file.name.removesuffix(ending): sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        for file in sorted((folder / "labelsTr").iterdir())
    }
    images = {file.name.removesuffix(f"_0000{ending}") for file in (folder / "imagesTr").iterdir()}
    assert images == set(labels) and description["numTraining"] == len(labels)
    folds = json.loads((folder / "splits_final.json").read_text())
    assert {case for fold in folds for part in fold.values() for case in part} == set(labels)
    for fold in folds:
        assert not set(fold["train"]) & set(fold["val"])
        assert all(len(set(part)) == len(part) for part in fold.values())
    return description, folds, labels


def require_nothing(nnunet: NnUNet) -> None:
    left = [path for root in (nnunet.raw, nnunet.preprocessed) if root.exists() for path in root.iterdir()]
    assert not left, left


def refuse(kind: str, source: Path, nnunet: NnUNet, text: str) -> None:
    """It is refused with this text, and nothing is written."""
    with pytest.raises(LoMixError, match=re.escape(text)):
        convert(kind, source)
    require_nothing(nnunet)


def replace(file: Path, content: bytes) -> None:
    """Another file in its place, as it may be a link."""
    file.unlink()
    file.write_bytes(content)
