"""The command ``nnunet_lomix``."""

import signal

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nnunet_lomix")
def main():
    """LoMix for nnU-Net v2."""


@main.command()
def info():
    """Print versions and trainers, and whether nnU-Net finds them or why not."""
    from nnunet_lomix.info import print_info  # slow to import

    if not print_info():
        raise SystemExit(1)


@main.command()
@click.option("--dim", type=click.Choice(["2", "3"]), default="2", show_default=True, help="2D or 3D images.")
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    default="nnunet_lomix_demo",
    show_default=True,
    help="Folder for everything that the demo writes.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Length of both trainings; by default some minutes.")
def demo(dim: str, out: str, epochs: int | None):
    """Train nnUNetTrainer and nnUNetTrainerLoMix on generated images and compare them.

    Needs neither data nor a GPU nor environment variables, and less than 10 minutes on two cores. If it was
    interrupted, the same command goes on where it stopped.
    """
    from nnunet_lomix.demo import default_settings, run_demo  # slow to import

    # a plain kill ends the trainings, too, as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_demo(out, default_settings(int(dim), epochs))
