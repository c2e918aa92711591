"""All that a GPU has to show, by one command in minutes: correctness, the loss, its kernels, steps, trainings, tests.

Each part is a list of tasks. First every task runs once in a process of its own, at the same time as the others: that
fills the caches of Triton and Inductor, and one that hangs or crashes harms no other. Those that measure no time are
done then. The others are measured one after the other in this process. What fails is written down with its error.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import loss
import step
import torch
from cases import CASES, CHECKS, ERROR_CASES, GPU_PARTS, NNUNET, Case, Check
from examples import (
    backend_and_stride,
    count_maps,
    default_backend,
    engine_case,
    losses_for,
    make_loss,
    make_outputs,
    make_targets,
    names_of_losses,
    time_passes,
)
from measuring import peak_memory
from results import Rows, read_record
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nnunet_lomix.demo.data import write_dataset
from nnunet_lomix.demo.steps import FINISHED_EPOCHS, FOLD, PLANS, TRAINERS, TRAINERS_FOLDER
from nnunet_lomix.errors import LoMixError
from nnunet_lomix.loss import LoMixLoss
from nnunet_lomix.loss.backends import fused
from nnunet_lomix.nnunet.commands import folders_below, run_command, trainers_first
from nnunet_lomix.nnunet.curves import read_curves
from nnunet_lomix.nnunet.results import ModelFolder

REPEATS = 9
TIMED = ("step", "epochs", "kernels", "loss")
ROOT = Path(__file__).parents[1]
RUNNER = Path(__file__).with_name("run.py")
KERNELS = ("forward_kernel", "backward_kernel")
SECONDS_OF_TESTS, SECONDS_OF_TASK = 150, 180  # the longest that the tests, and any task for the first time, may take
DATASET, CONFIGURATION, SHAPE, NUMBER_OF_CASES = "Dataset903_LoMixGPU", "3d_fullres", (40, 56, 40), 10
EPOCHS, ITERATIONS = 2, 40  # the last epoch counts; the trainers of the demo add 5 iterations of validation to each


class Task(NamedTuple):
    """Something that is measured by itself: a case of a part."""

    part: str
    name: str
    work: Callable[[], Rows]  # rows without part and case; a row may name a case of its own

    def run(self) -> Rows:
        """Its rows, or one that says what went wrong."""
        try:
            rows = self.work()
        except Exception as error:  # whatever it is: it is written down, and the other tasks go on
            return self.failed(f"{type(error).__name__}: {error}")
        finally:
            gc.collect()
            torch._dynamo.reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return [{"part": self.part, "case": self.name, **row} for row in rows]

    def failed(self, reason: str) -> Rows:
        return [{"part": self.part, "case": self.name, "what": "failure", "failure": reason}]


def list_tasks(cases: Sequence[str], device: str, repeats: int, folder: Path) -> list[Task]:
    """All tasks of all parts, those that take longest to compile first.

    Args:
        cases: names in ``CASES``.
        device: "cuda" or "cpu".
        repeats: how often each time is measured.
        folder: where nnU-Net's folders of the trainings are, or will be.
    """
    chosen = [CASES[name] for name in cases]
    by_part = {
        "step": {str(case): partial(measure_step, case, device, repeats) for case in chosen},
        "epochs": {f"nnUNetv2_train, {CONFIGURATION}": partial(measure_epochs, device, folder)},
        "tests": {"tests/loss, tests/trainers/test_lomix.py": run_tests},
        "kernels": {str(case): partial(measure_kernels, case, device, repeats) for case in chosen},
        "loss": {str(case): partial(measure_loss, case, device, repeats) for case in chosen},
        "correctness": {
            **{str(check): partial(compare_with_plain, check, device) for check in CHECKS},
            **{str(CASES[name]): partial(compare_with_float64, CASES[name], device) for name in ERROR_CASES[device]},
        },
    }
    return [Task(part, name, work) for part in GPU_PARTS for name, work in by_part[part].items()]


def measure(
    parts: Sequence[str], cases: Sequence[str], device: str, repeats: int, side_by_side: bool
) -> Iterator[Rows]:
    """The rows of one task after the other; those that fail have the column ``failure``.

    Args:
        parts: of ``GPU_PARTS``.
        cases, device, repeats: those of :func:`list_tasks`.
        side_by_side: whether each task runs once in a process of its own before anything is measured.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tasks = [task for task in list_tasks(cases, device, repeats, folder) if task.part in parts]
        first: dict[Task, Rows] = {}
        if side_by_side:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                run = partial(run_in_process, cases=cases, device=device, folder=folder)
                first = dict(zip(tasks, pool.map(run, tasks), strict=True))
        for task in tasks:
            rows = first.get(task, [])
            failed = any("failure" in row for row in rows)
            yield rows if failed or (rows and task.part not in TIMED) else task.run()


def run_one(name: str, parts: Sequence[str], cases: Sequence[str], device: str, folder: Path) -> Rows:
    """The rows of the task of that name, measured once: what a process of :func:`run_in_process` does."""
    tasks = list_tasks(cases, device, 1, folder)
    return next(task for task in tasks if task.part in parts and task.name == name).run()


def run_in_process(task: Task, cases: Sequence[str], device: str, folder: Path) -> Rows:
    """The rows of a task, measured once by this benchmark in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, "rows.json")
        command = [sys.executable, RUNNER, "gpu", "--device", device, "--part", task.part]
        command += [argument for name in cases for argument in ("--case", name)]
        command += ["--only", task.name, "--folder", folder, "--out", out]
        # otherwise each process would start as many others for compiling as there are cores
        variables = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1"}
        try:
            code, output = run_for(command, SECONDS_OF_TASK, variables)
        except LoMixError as error:
            return task.failed(str(error))
        if code or not out.exists():
            return task.failed(f"its process ended with {code}: {last_line(output)}")
        return read_record(out)["rows"]


def run_for(command: Sequence[object], seconds: float, variables: dict[str, str]) -> tuple[int, str]:
    """Exit code of a command, and what it printed; the variables are added to those of this process.

    Raises:
        LoMixError: it took longer than so many seconds, and was ended together with its own processes.
    """
    with subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise LoMixError(f"it took longer than {seconds:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def last_line(output: str) -> str:
    """The last line that isn't empty."""
    return next((line for line in reversed(output.splitlines()) if line.strip()), "nothing was printed")


def compare_with_plain(check: Check, device: str) -> Rows:
    """The largest error of sums and gradients of the kernels, see :func:`fused.worst_error`."""
    require_kernels(device)
    kind = {"regions": check.regions, "ignore_label": check.classes if check.ignore else None}
    lomix = LoMixLoss(check.classes, check.scales, mixed_scales=check.scales - 1, **kind).to(device)
    error = fused.worst_error(engine_case(lomix, device))
    return [{"what": "fused against plain", "error": error}]


def compare_with_float64(case: Case, device: str) -> Rows:
    """The errors of :func:`loss.error`."""
    names = names_for(case, device)[1:]
    return [{"what": f"{name} against float64", "error": loss.error(name, case, device)} for name in names]


def require_kernels(device: str) -> None:
    """Raises LoMixError where nothing runs the kernels."""
    if not has_kernels(device):
        raise LoMixError("the kernels need CUDA, or TRITON_INTERPRET=1")


def has_kernels(device: str) -> bool:
    return device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def require_cuda(device: str) -> None:
    """Raises LoMixError elsewhere."""
    if device != "cuda":
        raise LoMixError("this part needs CUDA")


def names_for(case: Case, device: str) -> list[str]:
    """nnU-Net's own loss, and both of the fused backend where its kernels run, or else of the default one.

    Raises:
        LoMixError: its kernels run here, but can't compute the case.
    """
    backend = "fused" if has_kernels(device) else default_backend(case, device)
    return losses_for(case, device, names_of_losses([backend]))


def measure_loss(case: Case, device: str, repeats: int) -> Rows:
    """Times of each loss, and on CUDA its memory beyond outputs and target in megabytes."""
    losses = {name: make_loss(name, case, device) for name in names_for(case, device)}
    times = loss.time_losses(losses, case, device, repeats)
    memory: dict[str, int | None] = dict.fromkeys(losses)
    if device == "cuda":
        outputs, targets = make_outputs(case, device), make_targets(case, device)
        for name, module in losses.items():
            memory[name] = peak_memory(partial(time_passes, module, outputs, targets, device), device)
    return [{"what": name, "maps": count_maps(name, case), **times[name], "memory_mb": memory[name]} for name in losses]


def measure_kernels(case: Case, device: str, repeats: int) -> Rows:
    """Milliseconds of the kernels alone in a forward and a backward pass of each loss, and the launches.

    ``other_ms`` is the time of all other kernels and copies. Beside them are those of ``kernels.estimate``.
    """
    require_cuda(device)
    from kernels import estimate  # takes Triton's interpreter away

    outputs, targets = make_outputs(case, device), make_targets(case, device)
    rows = []
    for name in names_for(case, device):
        module = make_loss(name, case, device)
        for _ in range(2):
            time_passes(module, outputs, targets, device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(repeats):
                time_passes(module, outputs, targets, device)
        events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        if not events:
            raise LoMixError("the profiler saw no kernels; is CUPTI there?")
        copies = sum(event.name.startswith(("Memcpy", "Memset")) for event in events)
        milliseconds = dict.fromkeys([*KERNELS, "other"], 0.0)
        for event in events:
            kind = event.name if event.name in KERNELS else "other"
            milliseconds[kind] += event.time_range.elapsed_us() / 1000
        row = {
            "what": name,
            "maps": count_maps(name, case),
            **{f"{kind}_ms": total / repeats for kind, total in milliseconds.items()},
            "launches": (len(events) - copies) / repeats,
            "copies": copies / repeats,
        }
        if name != NNUNET:
            row["estimate"] = estimate(case, backend_and_stride(name)[1])
        rows.append(row)
    return rows


def measure_step(case: Case, device: str, repeats: int) -> Rows:
    """The rows of the benchmark ``step``: on CUDA with torch.compile, nnU-Net's default there, and without."""
    rows = []
    for compiled in (True, False) if device == "cuda" else (False,):
        with patch.dict(os.environ, nnUNet_compile=str(compiled)):
            for row in step.measure_case(case, device, repeats, (), torch.get_num_threads()):
                what = row.pop("backend") + (", compiled" if compiled else "")
                rows.append({"what": what, **row})
        torch._dynamo.reset()
    return rows


def measure_epochs(device: str, folder: Path) -> Rows:
    """Seconds of the last epoch of a training by each trainer, one after the other, on a generated dataset."""
    budget = {"epochs": EPOCHS, "iterations": ITERATIONS, "finished_epochs": FINISHED_EPOCHS}
    variables = {
        **folders_below(folder),
        **trainers_first(TRAINERS_FOLDER),
        "NNUNET_LOMIX_DEMO": json.dumps(budget),
        "nnUNet_wandb_enabled": "0",
    }
    number = DATASET[len("Dataset") :].partition("_")[0]
    raw = folder / "raw" / DATASET
    if not raw.exists():  # the process of the first run has made it
        write_dataset(raw, SHAPE, NUMBER_OF_CASES, 0)
        plan = ["nnUNetv2_plan_and_preprocess", "-d", number, "-c", CONFIGURATION, "-npfp", 4, "-np", 4]
        run_command(plan, folder / "plan.log", variables)
    seconds, patch_size = {}, ""
    for trainer, name in TRAINERS.items():
        command = ["nnUNetv2_train", number, CONFIGURATION, FOLD, "-tr", name, "-p", PLANS, "-device", device]
        run_command(command, folder / f"{name}.log", variables)
        model = ModelFolder.of(folder / "results", DATASET, name, PLANS, CONFIGURATION)
        seconds[trainer] = float(read_curves(model.fold(FOLD))["seconds"].iloc[-1])
        planned = model.read_plans()["configurations"][CONFIGURATION]
        patch_size = f"batch {planned['batch_size']}, patch {' × '.join(map(str, planned['patch_size']))}"
    return [
        {
            "case": f"nnUNetv2_train, {CONFIGURATION}, {patch_size}",
            "what": trainer,
            "epoch_s": own,
            "epoch_ratio": own / seconds["nnUNetTrainer"],
        }
        for trainer, own in seconds.items()
    ]


def run_tests() -> Rows:
    """The tests that run on the device at hand; the last line of pytest's output says how they went."""
    side_by_side = ["-n", "4"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *side_by_side]
    code, output = run_for([*command, "tests/loss", "tests/trainers/test_lomix.py"], SECONDS_OF_TESTS, {})
    return [{"what": "pytest", "passed": code == 0, "summary": last_line(output).strip("= ")}]
