"""Time and memory of ``nnunet_lomix compare`` by number of cases.

Two folders of predictions and one of references, of ``WIDTH``³ voxels with 8 organs. The voxels of all cases are those
of a few files, but no case has the bytes of another one, so that the cache finds none; then a second call finds all of
them.
"""

import gzip
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from joblib.externals.loky import get_reusable_executor
from measuring import in_its_own_process, peak_of_process
from results import Rows
from scipy.ndimage import gaussian_filter

KEY = ("cases",)
WIDTH = 128  # voxels along each axis
DISTINCT = 4  # files of different voxels in each folder
NOISE = {"references": 0, "old": 0.5, "new": 0.3}  # how far each folder is from the references


def measure(numbers_of_cases: Sequence[int], jobs: int) -> Rows:
    """A row for each number of cases.

    Seconds of the first call, those of a second one, and the seconds of all processors in the first; megabytes of the
    calling process and of the largest worker.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {name: [make_segmentation(i, noise) for i in range(DISTINCT)] for name, noise in NOISE.items()}
        for cases in numbers_of_cases:
            root = Path(folder, str(cases))
            write_cases(root, files, cases)
            first, again = (in_its_own_process(call, root, jobs) for _ in range(2))
            rows.append({"cases": cases, **first, "again_s": again["first_s"]})
    return rows


def make_segmentation(number: int, noise: float) -> bytes:
    """A file of organs, a bumpy ball in each octant; it fills about two thirds of the octant's width."""
    shape, octant_width = (WIDTH, WIDTH, WIDTH), WIDTH // 2
    rng = np.random.default_rng(number)
    bumps, changes = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    bumps = gaussian_filter(bumps + noise * changes, octant_width * 6 / 64)
    octant, position = np.divmod(np.indices(shape), octant_width)
    radius = np.linalg.norm(position - (octant_width - 1) / 2, axis=0)
    inside = radius + octant_width / 16 * bumps / bumps.std() < octant_width / 3.2
    labels = np.where(inside, 1 + np.tensordot((1, 2, 4), octant, 1), 0).astype(np.uint8)
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing((0.8, 0.8, 2.5))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "labels.nii.gz")
        sitk.WriteImage(image, file)
        return file.read_bytes()


def write_cases(root: Path, files: dict[str, list[bytes]], cases: int) -> None:
    """Folders of predictions and references below ``root``, and the dataset.json."""
    for name, contents in files.items():
        (root / name).mkdir(parents=True)
        for case in range(cases):
            # an empty part with a date of its own: other bytes, the same voxels
            unique = contents[case % DISTINCT] + gzip.compress(b"", mtime=case)
            (root / name / f"case_{case}.nii.gz").write_bytes(unique)
    labels = {"background": 0} | {f"organ {i}": i for i in range(1, 9)}
    (root / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))


def call(root: Path, jobs: int) -> dict[str, float]:
    """What one call takes, in a process that has made none before."""
    start = time.perf_counter()
    from nnunet_lomix.compare import compare, read_folders  # users wait for it, too

    source = read_folders(root / "references", [root / "old", root / "new"], jobs=jobs)
    compare(source, jobs=jobs, cache_file=root / "cache.json")
    seconds = time.perf_counter() - start
    get_reusable_executor().shutdown()  # the system counts the workers once they have ended
    own, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "first_s": seconds,
        "processors_s": sum(usage.ru_utime + usage.ru_stime for usage in (own, workers)),
        "memory_mb": peak_of_process() / 1024,
        "worker_memory_mb": workers.ru_maxrss / 1024,
    }
