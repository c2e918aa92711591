"""The benchmarks: python benchmarks/run.py --help

Install what they need by: pip install -e ".[benchmarks]"
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import click
import torch
from cases import CASES, DEFAULT_CASES, GPU, GPU_PARTS, KERNEL_CASES
from examples import names_of_losses
from results import FOLDER, Rows, make_record, write_record

from nnunet_lomix.cli import Commands
from nnunet_lomix.loss import BACKENDS

Command = Callable[..., None]


@click.group(cls=Commands)
def main() -> None:
    """Measure LoMix, and write the documents' tables.

    Results are written to benchmarks/results; those of single cases or backends only where --out says.
    """


def case_options(command: Command) -> Command:
    """Where a benchmark runs, how often, and for which cases."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for option in (
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default=device, show_default=True),
        click.option("--threads", default=1, show_default=True, help="Threads of the processor."),
        click.option("--repeats", type=click.IntRange(min=1), help="How often each is measured; each has a default."),
        click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, help="May be repeated."),
    ):
        command = option(command)
    return command


def result_options(command: Command) -> Command:
    """Where results go."""
    return click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File of the results.")(command)


BY_DEVICE = {
    "loss": "Time, memory and error of the loss by each backend, beside nnU-Net's deep supervision.",
    "memory": "Memory of the loss alone: of large cases that take a CPU long.",
    "step": "Time of a training step of nnUNetTrainerLoMix beside nnUNetTrainer's.",
}


def measure_on_device(
    name: str,
    device: str,
    threads: int,
    repeats: int | None,
    cases: Sequence[str],
    backends: Sequence[str],
    out: Path | None,
) -> None:
    """Run one of ``BY_DEVICE`` with several backends."""
    torch.set_num_threads(threads)
    benchmark = import_module(name)
    repeats = repeats or benchmark.REPEATS
    chosen = [CASES[case] for case in cases or DEFAULT_CASES[name][device]]
    rows = benchmark.measure(chosen, device, repeats, backends)
    if out is None and not cases and not backends:
        out = FOLDER / f"{name}_{device}.json"
    finish(name, rows, device, {"threads": threads, "repeats": repeats}, out)


for name, what in BY_DEVICE.items():
    names = click.Choice(names_of_losses(BACKENDS))
    command = click.option("--backend", "backends", type=names, multiple=True, help="As --case.")
    command = result_options(case_options(command(partial(measure_on_device, name))))
    main.command(name, help=what)(command)


@main.command()
@case_options
@click.option("--part", "parts", type=click.Choice(GPU_PARTS), multiple=True, help="May be repeated; default all.")
@click.option("--no-tests", is_flag=True, help="Leave out the tests.")
@click.option("--only", hidden=True, help="Run this task once and nothing else, as the command does to compile.")
@click.option("--folder", type=click.Path(path_type=Path), hidden=True, help="Of the trainings, for --only.")
@result_options
def gpu(
    device: str,
    threads: int,
    repeats: int | None,
    cases: Sequence[str],
    parts: Sequence[str],
    no_tests: bool,
    only: str | None,
    folder: Path,
    out: Path | None,
) -> None:
    """All that a GPU has to show, in minutes: correctness, times of loss, kernels, steps and epochs, and the tests.

    Without CUDA this only tries the benchmark; parts that need CUDA say so.
    """
    torch.set_num_threads(threads)
    benchmark = import_module("gpu")
    if out is None and device == "cuda" and not cases and not parts:
        out = FOLDER / "gpu_cuda.json"
    repeats = repeats or benchmark.REPEATS
    cases = cases or DEFAULT_CASES["gpu"][device]
    parts = [part for part in parts or GPU_PARTS if not (no_tests and part == "tests")]
    if only is None:
        tasks = benchmark.measure(parts, cases, device, repeats, side_by_side=device == "cuda")
    else:
        tasks = [benchmark.run_one(only, parts, cases, device, folder)]
    options = {"threads": threads, "repeats": repeats}
    unfinished = None if out is None else out.with_name(f"unfinished_{out.name}")
    rows: Rows = []
    for new in tasks:
        rows += new
        click.echo(f"{new[0]['part']}: {new[0]['case']}: {new[0].get('failure', 'done')}", err=True)
        if unfinished is not None:  # what is known is kept, should the machine be taken away
            write_record(make_record("gpu", rows, device, options), unfinished)
    finish("gpu", rows, device, options, out, more_tables=("gpu_kernels", "gpu_checks"))
    if unfinished is not None:
        unfinished.unlink()


@main.command()
@result_options
def kernels(out: Path | None) -> None:
    """Instructions of the compiled Triton kernels, for GPUs that needn't be here, and what the loss should take."""
    benchmark = import_module("kernels")
    rows = benchmark.measure(KERNEL_CASES, [CASES[name] for name in GPU])
    finish("kernels", rows, None, {}, out or FOLDER / "kernels.json", more_tables=["estimate"])


def finish(
    name: str,
    rows: Rows,
    device: str | None,
    options: Mapping[str, object],
    out: Path | None,
    more_tables: Sequence[str] = (),
) -> None:
    """Print the results, and write them to ``out``."""
    from documents import TABLES, as_markdown, describe

    record = make_record(name, rows, device, options)
    for table in (name, *more_tables):
        click.echo(f"{as_markdown(TABLES[table](record))}\n")
    click.echo(describe(record))
    if out is not None:
        write_record(record, out)
        click.echo(f"\nWritten to {out}")


@main.command()
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), default="nnunet_lomix_demo", show_default=True
)
def documents(folder: Path) -> None:
    """Run the demo, and write the documents' pictures and tables anew. Needs chromium, and playwright."""
    from documents import write_documents
    from pictures import write_pictures

    for file in [*write_pictures(folder), *write_documents()]:
        click.echo(f"Written: {file}")


@main.command()
def tables() -> None:
    """Write the tables of the Markdown documents anew, from benchmarks/results."""
    from documents import write_documents

    for file in write_documents():
        click.echo(f"Written: {file}")


if __name__ == "__main__":
    main()
