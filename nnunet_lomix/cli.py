"""The command ``nnunet_lomix``."""

import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from nnunet_lomix.errors import LoMixError, UsageError
from nnunet_lomix.experiments import SCHEDULERS

COUNT = click.IntRange(min=1)
FOLDER = click.Path(file_okay=False)
FOLDER_THERE = click.Path(exists=True, file_okay=False)
FILE_THERE = click.Path(exists=True, dir_okay=False)


class Command(click.Command):
    """A command that shows what the library raises as click shows its own errors: one sentence, without a traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse ``-device``, as nnU-Net spells it, which click would take for ``-d evice``."""
        known = {name for option in self.params for name in option.opts}
        for arg in args:
            word = re.match("-[A-Za-z_]{2,}", arg)
            if word and word[0] not in known:
                hint = f"; did you mean -{word[0]}?" if f"-{word[0]}" in known else "."
                raise click.UsageError(f"There is no option {word[0]}{hint}", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise click.UsageError(_in_one_line(error), ctx) from None
        except LoMixError as error:
            raise click.ClickException(_in_one_line(error)) from None
        except BrokenPipeError:  # whoever reads the output has left, which click knows
            raise
        except OSError as error:  # a name that is too long, a folder of somebody else, a full disk
            raise click.ClickException(f"{error.filename or 'A file'}: {error.strerror or error}.") from None

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence of the help, whole: it is wrapped, not cut."""
        return " ".join((self.help or "").split("\n\n")[0].split()).rstrip(".")


def _in_one_line(error: Exception) -> str:
    """The sentence, whatever is in the names of the user's files."""
    return " ".join(str(error).splitlines())


class Commands(click.Group):
    """All commands of the package are of the class :class:`Command`."""

    command_class = Command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; what the encoding of the terminal or of a redirected output lacks is printed as ``?``.

        Ctrl-C ends the process at once, until the command has called :func:`clean_up_when_stopped`: an interrupt in the
        middle of an import, which takes seconds, comes out as anything at all.
        """
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        before = {number: signal.getsignal(number) for number in STOPPING}
        if before[signal.SIGINT] is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            return super().main(*args, **kwargs)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# Ctrl-C, a plain kill or the end of a job's time, a terminal that is closed; Windows lacks the last one
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def clean_up_when_stopped() -> None:
    """From here on these signals are a KeyboardInterrupt; one that is ignored, as by nohup, stays so."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="nnunet_lomix")
def main() -> None:
    """LoMix for nnU-Net v2."""
    # torch warns of what libraries do that nnU-Net imports, about which whoever runs a command can do nothing
    warnings.simplefilter("ignore", FutureWarning)


@main.command()
def info() -> None:
    """Print versions and trainers, and whether nnU-Net finds them or why not."""
    from nnunet_lomix.info import print_info  # slow to import

    clean_up_when_stopped()
    if not print_info():
        raise SystemExit(1)


@main.command()
@click.option("--dim", type=click.Choice(["2", "3"]), default="2", help="2D or 3D images.")
@click.option("--out", type=FOLDER, default="nnunet_lomix_demo", help="Folder for everything that the demo writes.")
@click.option("--epochs", type=COUNT, help="Length of both trainings; by default some minutes.")
def demo(dim: str, out: str, epochs: int | None) -> None:
    """Train nnUNetTrainer and nnUNetTrainerLoMix on generated images and compare them.

    Needs neither data nor a GPU nor environment variables, and about 5 minutes on two cores that have nothing else
    to do. If it was interrupted, the same command goes on where it stopped.
    """
    from nnunet_lomix.demo import default_settings, run_demo  # slow to import

    clean_up_when_stopped()
    run_demo(out, default_settings(int(dim), epochs))


@main.command()
@click.argument("kind", metavar="{synapse|acdc|polyp}", type=click.Choice(["synapse", "acdc", "polyp"]))
@click.argument("source", type=click.Path(exists=True))
@click.option("-d", "--dataset", type=click.IntRange(1, 999), help="Number of the dataset; by default 601, 602 or 603.")
def convert(kind: str, source: str, dataset: int | None) -> None:
    """Write a public dataset of the LoMix paper in nnU-Net's raw format, with the paper's split as folds.

    SOURCE is the folder of the unpacked download: RawData of Synapse (BTCV), ACDC's database, CVC-ClinicDB or another
    collection of polyps. It is only read.
    """
    from nnunet_lomix.convert import convert as convert_download  # slow to import

    clean_up_when_stopped()
    convert_download(kind, source, dataset)


@main.command()
@click.option("-d", "--dataset", required=True, help="Number or name of a preprocessed dataset.")
@click.option("--train-cases", type=int, metavar="N", help="Number of training cases; or:")
@click.option("--train-fraction", type=float, metavar="F", help="Fraction of the fold's training cases, 0.05 for 5 %.")
@click.option("--seeds", type=COUNT, default=3, help="Number of random subsets.")
@click.option("--fold", type=int, default=0, help="The fold that is drawn from.")
def splits(dataset: str, train_cases: int | None, train_fraction: float | None, seeds: int, fold: int) -> None:
    """Add folds with few training cases to nnU-Net's splits_final.json, behind those that are there.

    They have the validation cases of the fold that is drawn from. The file is backed up first. Train them by their
    number, as any fold.
    """
    from nnunet_lomix.splits import add_scarce_folds  # slow to import

    clean_up_when_stopped()
    add_scarce_folds(dataset, train_cases, train_fraction, seeds, fold)


@main.command()
@click.argument("results_folder", type=FOLDER_THERE)
@click.option("--out", type=click.Path(), required=True, help="Folder to make; the model is in DATASET below it.")
@click.option(
    "--case",
    "images",
    type=FILE_THERE,
    multiple=True,
    help="An image of a case that both models must predict alike; may be repeated.",
)
@click.option("--dataset-name", metavar="DatasetNNN_NAME", help="Another name of the dataset, for nnU-Net's -d.")
@click.option("--plans-name", metavar="NAME", help="Another name of the plans, for nnU-Net's -p.")
def export(
    results_folder: str, out: str, images: tuple[str, ...], dataset_name: str | None, plans_name: str | None
) -> None:
    """Write a trained model as one of nnUNetTrainer, for people who have only nnU-Net.

    RESULTS_FOLDER is a trainer's: nnUNetTrainerLoMix__nnUNetPlans__2d. Another name for the dataset or the plans keeps
    the model from replacing an nnUNetTrainer model of those who install it.
    """
    from nnunet_lomix.export import export_model  # slow to import

    clean_up_when_stopped()
    export_model(results_folder, out, images, dataset_name, plans_name)


@main.command()
@click.argument("results_folders", type=FOLDER_THERE, nargs=-1, required=True)
@click.option("--out", type=FOLDER, default="lomix_weights", help="Folder for the picture and the table.")
def weights(results_folders: tuple[str, ...], out: str) -> None:
    """Show what LoMix has learned: which scales and operators mattered, and whether the folds agree.

    RESULTS_FOLDERS are a trainer's, of which all folds are taken, or those of single folds. Several trainers are shown
    side by side, and so are folds with few and with all training cases.
    """
    from nnunet_lomix.weights import show_weights  # slow to import

    clean_up_when_stopped()
    show_weights(results_folders, out)


class Lists(Command):
    """A command whose repeatable options take several values, too: ``--names A B`` is ``--names A --names B``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        lists = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread: list[str] = []
        option = None
        for arg in args:
            if arg.startswith("-"):
                option = arg if arg in lists else None
            elif option and spread[-1] != option:  # click itself takes the first value
                spread.append(option)
            spread.append(arg)
        return super().parse_args(ctx, spread)


RESULTS = click.option(
    "--results",
    multiple=True,
    type=click.Path(),
    metavar="DIR…",
    help="Results folders, one for each seed; by default $nnUNet_results.",
)


@main.command(cls=Lists)
@click.option("-d", "--dataset", help="Number or name of a dataset whose folds are trained and validated; with:")
@click.option("-c", "--configuration", help="2d, 3d_fullres, …")
@click.option("-tr", "--trainers", multiple=True, metavar="A B…", help="Trainers, the reference first.")
@click.option("-p", "--plans", help="Their plans; by default nnUNetPlans.")
@click.option("-f", "--folds", multiple=True, metavar="0 1…", help="Folds; by default all that are validated.")
@RESULTS
@click.option("--references", type=click.Path(), metavar="DIR", help="Instead of a dataset: true segmentations; with:")
@click.option(
    "--predictions",
    multiple=True,
    type=click.Path(),
    metavar="DIR DIR…",
    help="Predicted segmentations, named as the references are; the reference trainer's first.",
)
@click.option("--images", type=click.Path(), metavar="DIR", help="Their images, named as nnU-Net's, for the pictures.")
@click.option(
    "--names",
    multiple=True,
    metavar="A B…",
    help="A name for each of --trainers or --predictions; those with one name are seeds of one trainer. By default "
    "folders are named by what tells their paths apart.",
)
@click.option(
    "--intersection", is_flag=True, help="Compare the folds and cases that all have; by default all must have the same."
)
@click.option(
    "--metrics",
    multiple=True,
    metavar="A B…",
    help="Of Dice, NSD, HD95, IoU and clDice (for vessels), the most important first; by default all but clDice.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1.0,
    help="Of the normalised surface Dice, in mm (pixels for PNG, BMP, 2D TIFF): what experts differ by. Less than a "
    "voxel asks for exact boundaries.",
)
@click.option("--jobs", type=COUNT, default=min(8, os.cpu_count() or 1), help="Processes.")
@click.option(
    "--out",
    type=FOLDER,
    default="nnunet_lomix_compare",
    help="Folder for the report, and for the scores of files that need not be scored again.",
)
def compare(
    dataset: str | None,
    configuration: str | None,
    trainers: tuple[str, ...],
    plans: str | None,
    folds: tuple[str, ...],
    results: tuple[str, ...],
    references: str | None,
    predictions: tuple[str, ...],
    images: str | None,
    names: tuple[str, ...],
    intersection: bool,
    metrics: tuple[str, ...],
    tolerance: float,
    jobs: int,
    out: str,
) -> None:
    """Compare trainers on the same cases: Dice, surface Dice, HD95 and IoU, with intervals and tests.

    \b
    nnunet_lomix compare -d 4 -c 2d -tr nnUNetTrainer nnUNetTrainerLoMix
    nnunet_lomix compare --references labels --predictions before after
    """
    if dataset and configuration and trainers and not (references or predictions):
        if images:
            raise click.UsageError("--images belongs to --references: those of a dataset are found in nnUNet_raw.")
        from nnunet_lomix.compare import read_results  # slow to import

        clean_up_when_stopped()
        plans = plans or "nnUNetPlans"
        source = read_results(dataset, configuration, trainers, plans, folds, results, names, intersection)
    elif references and predictions and not (dataset or configuration or trainers):
        if plans or folds or results:
            raise click.UsageError("-p, -f and --results belong to -d: leave them out with --references.")
        from nnunet_lomix.compare import read_folders  # slow to import

        clean_up_when_stopped()
        source = read_folders(references, predictions, names, intersection, jobs, images)
    else:
        raise click.UsageError("Give -d, -c and --trainers, or --references and --predictions.")
    from rich.console import Console

    from nnunet_lomix.compare import compare_into

    compare_into(out, source, Console(), tolerance, jobs, metrics)


def _split_pairs(context: click.Context, option: click.Parameter, pairs: tuple[str, ...]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            example = SCHEDULERS[str(option.name)].example.split()[0]
            raise click.UsageError(f"--{option.name} takes KEY=VALUE, such as {example}, not {pair!r}.")
    return dict(pair.split("=", 1) for pair in pairs)


def describes_an_experiment(command: Callable[..., None]) -> Callable[..., None]:
    """What run and status have in common: a file, or options in place of its entries."""
    options = [
        click.argument("plan", required=False, type=FILE_THERE),
        click.option("-d", "--datasets", multiple=True, metavar="D…", help="Numbers or names."),
        click.option("-c", "--configurations", multiple=True, metavar="C…", help="2d, 3d_fullres, …"),
        click.option("-tr", "--trainers", multiple=True, metavar="A B…", help="The first is the report's reference."),
        click.option("-p", "--plans", multiple=True, metavar="P…", help="By default nnUNetPlans."),
        click.option("-f", "--folds", multiple=True, metavar="0 1…", help="By default 0 1 2 3 4."),
        RESULTS,
        click.option(
            "--device", type=click.Choice(["cuda", "cpu", "mps"]), help="By default CUDA where there is a GPU."
        ),
        click.option("--gpus", multiple=True, metavar="0 1…", help="GPUs, each for one training at a time; or:"),
        click.option("--jobs", type=COUNT, help="Trainings at a time on the CPU; by default 1."),
        *(
            click.option(
                f"--{name}",
                multiple=True,
                callback=_split_pairs,
                metavar="KEY=VALUE…",
                help=f"Run as a job array of {name.upper()}, with these options of {scheduler.command}: "
                f"{scheduler.example}",
            )
            for name, scheduler in SCHEDULERS.items()
        ),
        click.option("--out", type=click.Path(), help="Folder for logs and the report; by default nnunet_lomix_run."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command(cls=Lists)
@describes_an_experiment
@click.option("--retry", is_flag=True, help="Run those that have failed, too.")
@click.option("--dry-run", is_flag=True, help="Print nnU-Net's commands instead of running them.")
@click.option("--npz", is_flag=True, help="Save probabilities for ensembles, beside other options of the file.")
def run(plan: str | None, retry: bool, dry_run: bool, npz: bool, **options: Any) -> None:
    """Train all that is missing of an experiment, continue what was interrupted, and compare the trainers.

    PLAN is a YAML file; options stand for its entries, or replace them.

    \b
    nnunet_lomix run plan.yaml
    nnunet_lomix run -d 4 -c 2d -tr nnUNetTrainer nnUNetTrainerLoMix --gpus 0 1
    """
    from rich.console import Console

    from nnunet_lomix.experiments.experiment import read_experiment  # slow to import
    from nnunet_lomix.experiments.run import run_experiment

    clean_up_when_stopped()
    experiment = read_experiment(plan, options)
    if npz and "--npz" not in experiment.options:
        experiment = replace(experiment, options=(*experiment.options, "--npz"))
    run_experiment(experiment, Console(), retry, dry_run)


@main.command(cls=Lists)
@describes_an_experiment
def status(plan: str | None, **options: Any) -> None:
    """Show which trainings of an experiment are done, running, queued, interrupted, failed and missing.

    By what nnU-Net has written, so that trainings count that were started by hand.
    """
    from rich.console import Console

    from nnunet_lomix.experiments.experiment import read_experiment  # slow to import
    from nnunet_lomix.experiments.run import show_status

    clean_up_when_stopped()
    show_status(read_experiment(plan, options), Console())
