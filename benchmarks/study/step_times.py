"""Time of a training step of every arm of the study, relative to nnUNetTrainer's.

    python benchmarks/study/step_times.py --out STUDY_FOLDER --dataset Dataset004_Hippocampus

needs a folder in which study.py has prepared the dataset. All arms are trained in one process, on one thread, and take
their turns step by step on the same batches, so that all suffer the same noise. "relative" is the time of
all steps, since alignment measures at every tenth, relative to nnUNetTrainer's; "by step" is the median ratio to
nnUNetTrainer's step of the same turn, with the 20th and 80th percentile.
"""

import json
import os
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import pandas as pd
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from side_by_side import make_trainer
from study import EPOCHS  # lets Python find the arms, too

from nnunet_lomix.cli import Command
from nnunet_lomix.nnunet.commands import folders_below


@click.command(cls=Command, help=__doc__.replace("\n\n", "\n\n\b\n"))
@click.option("--out", type=click.Path(exists=True, file_okay=False, path_type=Path), default="study")
@click.option("--dataset", default="Dataset004_Hippocampus", show_default=True)
@click.option("--arms", default="", help="separated by commas; default all")
@click.option("--optimiser", default="sgd", show_default=True)
@click.option("--turns", default=40, show_default=True, help="steps of every arm; two more warm up")
def main(out: Path, dataset: str, arms: str, optimiser: str, turns: int) -> None:
    from arms import ARMS

    names = ["nnUNetTrainer", *(arm for arm in arms.split(",") if arm)] if arms else list(ARMS)
    with tempfile.TemporaryDirectory() as results:
        os.environ |= {
            **folders_below(out),
            "nnUNet_results": results,
            "nnUNet_n_proc_DA": "0",
            "NNUNET_LOMIX_STUDY": json.dumps(dict(seed=0, epochs=EPOCHS, iterations=turns, optimiser=optimiser)),
        }
        with redirect_stdout(StringIO()):  # a banner of each trainer
            trainers = {name: make_trainer(name, out / "preprocessed" / dataset) for name in names}
            for trainer in trainers.values():
                trainer.print_to_log_file = lambda *text, **options: None
            seconds = measure(trainers, turns)
    table = pd.DataFrame(
        {
            "maps": [len(getattr(t.loss, "maps", [])) or "" for t in trainers.values()],
            "ms": [f"{1000 * s:.0f}" for s in seconds.median()],
            "relative": [f"{total:.2f}" for total in seconds.sum() / seconds["nnUNetTrainer"].sum()],
            "by step": [spread(seconds[name] / seconds["nnUNetTrainer"]) for name in names],
        },
        index=pd.Index(names, name="arm"),
    )
    print(f"{dataset}, a step of {trainers[names[0]].batch_size} patches, torch {torch.__version__}\n")
    print(table.to_markdown(disable_numparse=True))


def measure(trainers: dict[str, nnUNetTrainer], turns: int) -> pd.DataFrame:
    """Seconds of each turn (row) and arm (column)."""
    batches: dict[bool, Any] = {}
    for trainer in trainers.values():
        trainer.network.train()
        # a single output gets its target at one resolution only
        key = trainer.enable_deep_supervision
        if key not in batches:
            batches[key] = trainer.get_dataloaders()[0]
    rows = []
    for _ in range(turns + 2):
        batch = {key: next(loader) for key, loader in batches.items()}
        rows.append({name: time_step(t, batch[t.enable_deep_supervision]) for name, t in trainers.items()})
    return pd.DataFrame(rows[2:])


def time_step(trainer: nnUNetTrainer, batch: dict) -> float:
    start = perf_counter()
    trainer.train_step(batch)
    return perf_counter() - start


def spread(ratios: pd.Series) -> str:
    low, median, high = ratios.quantile([0.2, 0.5, 0.8])
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
