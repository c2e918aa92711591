"""What the converters share: finding and checking a download, and its volumes."""

import gzip
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from nnunet_lomix.errors import LoMixError, explaining, shorten
from nnunet_lomix.nnunet.datasets import require_utf8

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".rar", ".7z")
CHUNK = 2**20  # bytes


class Case(NamedTuple):
    """The files of a case in a download."""

    image: Path
    labels: Path


@dataclass(frozen=True)
class Download:
    """A download that is whole, as far as the names and headers of its files tell.

    Attributes:
        name: of the dataset, behind nnU-Net's ``DatasetNNN_``.
        number: of the dataset, if the user gives none.
        channels: their names, by which nnU-Net chooses how it normalises intensities.
        classes: their names, from label 1 on.
        ending: of nnU-Net's files.
        cases: the files, by nnU-Net's name of the case.
        train, test, val: the paper's; the last may be empty.
        write_image, write_labels: make nnU-Net's file (second) of one of the download (first); they raise
            :class:`LoMixError` for a file that isn't as it should be.
        notes: sentences that a user should know.
    """

    name: str
    number: int
    channels: Sequence[str]
    classes: Sequence[str]
    ending: str
    cases: Mapping[str, Case]
    train: list[str]
    test: list[str]
    val: list[str]
    write_image: Callable[[Path, Path], None]
    write_labels: Callable[[Path, Path], None]
    notes: list[str] = field(default_factory=list)


def find_folder(source: Path, inside: str, what: str) -> Path:
    """The folder that has a folder ``inside`` in it: the source, or one up to three levels below it.

    Raises:
        LoMixError: there is none; ``what`` says for what it was searched.
    """
    for level in ("", "*/", "*/*/", "*/*/*/"):
        for folder in sorted(source.glob(level + inside)):
            if folder.is_dir():
                return folder.parent
    raise LoMixError(f"{source} has no {what}: {advise(source)}")


def advise(source: Path) -> str:
    """What to do about a folder that isn't the download."""
    packed = shorten(file.name for file in sorted(source.iterdir()) if file.name.lower().endswith(ARCHIVES))
    return f"unpack {packed} first." if packed else "give the folder that comes out when the download is unpacked."


def find_volume(path: Path) -> Path:
    """A volume by its path without ending: ``x.nii.gz``, ``x.nii``, or a folder of such a name with the file in it.

    The first is where it should be, if there is none.
    """
    names = [path.with_name(path.name + ending) for ending in (".nii.gz", ".nii")]
    choices = [*names, *(folder / name for folder in names for name in (folder.name, f"{path.name}.nii"))]
    return next((file for file in choices if file.is_file()), names[0])


def require_files(folder: Path, files: Iterable[Path]) -> None:
    """Refuse a download that lacks files.

    Raises:
        LoMixError: some are missing or empty; it names the first ones, relative to the folder.
    """
    missing = [str(file.relative_to(folder)) for file in files if not file.is_file() or not file.stat().st_size]
    if missing:
        raise LoMixError(f"{folder} lacks {shorten(missing)}: the download is not whole, so repeat it.")


def check_grids(cases: Iterable[Case]) -> list[str]:
    """Refuse volumes and labels that differ in size or spacing, by their headers.

    Returns:
        A sentence on labels that lie elsewhere, if there are any. nnU-Net takes voxels as they are in the arrays, so it
        trains on these, with a warning.

    Raises:
        LoMixError: a file can't be read, or labels don't fit their image.
    """
    moved = []
    for case in cases:
        image, labels = map(_read_header, case)
        for what, unit in (("Size", "voxels"), ("Spacing", "mm")):
            wanted, own = (getattr(header, f"Get{what}")() for header in (image, labels))
            if len(wanted) != len(own) or not np.allclose(wanted, own, rtol=1e-3, atol=0):
                differing = " and ".join(" × ".join(f"{n:g}" for n in numbers) for numbers in (own, wanted))
                raise LoMixError(
                    f"{case.labels} differs from its image in {what.lower()} ({differing} {unit}): repeat the download."
                )
        placement, own = ([*header.GetOrigin(), *header.GetDirection()] for header in (image, labels))
        if not np.allclose(placement, own, rtol=1e-3, atol=1e-2):
            moved.append(case.labels.name)
    ignored = "By their headers these labels lie elsewhere than their images, which nnU-Net ignores"
    return [f"{ignored}: {shorten(moved)}."] if moved else []


def _read_header(file: Path) -> sitk.ImageFileReader:
    require_utf8(file)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    with explaining(f"{file} can't be read, so repeat the download"):
        reader.ReadImageInformation()
    return reader


def copy_volume(source: Path, target: Path) -> None:
    """Copy a volume as ``.nii.gz``: byte by byte if it is one.

    Raises:
        LoMixError: it is damaged or cut off, by its checksum.
    """
    with explaining(f"{source} is damaged, so repeat the download"):
        with source.open("rb") as stream:
            is_packed = stream.read(2) == b"\x1f\x8b"  # whatever its name says
        if not is_packed:
            sitk.WriteImage(sitk.ReadImage(str(source)), str(target), useCompression=True)
            return
        with gzip.open(source) as unpacked:
            while unpacked.read(CHUNK):
                pass
    shutil.copyfile(source, target)


def relabel(values: Sequence[int]) -> Callable[[Path, Path], None]:
    """A function that writes labels anew.

    Args:
        values: for each value of the download, 0 first, the one that it gets.

    Returns:
        Writes the second file from the first; raises :class:`LoMixError` if that can't be read, or has other values.
    """
    table = np.array(values, np.uint8)

    def write(source: Path, target: Path) -> None:
        with explaining(f"{source} can't be read, so repeat the download"):
            image = sitk.ReadImage(str(source))
        found = sitk.GetArrayFromImage(image)
        indices = found.astype(np.int64)
        if not np.array_equal(indices, found) or indices.min() < 0 or indices.max() >= len(table):
            raise LoMixError(
                f"{source} has values other than 0 to {len(table) - 1} ({found.min():g} to {found.max():g}): it isn't "
                "the labels of this dataset."
            )
        written = sitk.GetImageFromArray(table[indices])
        written.CopyInformation(image)
        sitk.WriteImage(written, str(target), useCompression=True)

    return write
