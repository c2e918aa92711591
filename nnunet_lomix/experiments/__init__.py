"""Experiments: many training runs, on this machine or by a scheduler of a cluster, to one report.

- ``experiment``: what is trained, from a file or from options;
- ``training``: one training: its command, its files, and its state by what nnU-Net has written;
- ``preparation``: what must be there before trainings start, and which of them can;
- ``machine``: the loop; ``local``, ``slurm``: the places where trainings run, a file for each;
- ``job``: what runs one training, in a process of its own, with a log;
- ``display``: what the terminal shows; ``run``: the commands.
"""

from typing import NamedTuple


class Scheduler(NamedTuple):
    """How the command line and a file know a scheduler, by its name in SCHEDULERS.

    Attributes:
        machine: its subclass of ``Machine``, as MODULE:CLASS, which is imported when it is needed.
        command: whose options the user may give.
        example: some of them.
    """

    machine: str
    command: str
    example: str


SCHEDULERS = {
    "slurm": Scheduler("nnunet_lomix.experiments.slurm:Slurm", "sbatch", "partition=gpu time=24:00:00 gres=gpu:1"),
}
