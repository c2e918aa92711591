"""Experiments: many trainings, on this machine or a SLURM cluster, to one report.

- ``experiment``: what is trained, from a file or from options;
- ``training``: one training: its command, its files, and its state by what nnU-Net has written;
- ``preparation``: what must be there before trainings start, and which of them can;
- ``machine``: the loop; ``local``, ``slurm``: the two places where trainings run, a file for each;
- ``job``: what runs one training, in a process of its own, with a log;
- ``display``: what the terminal shows; ``run``: the commands.
"""

from nnunet_lomix.experiments.experiment import Experiment, read_experiment

__all__ = ["Experiment", "read_experiment"]
