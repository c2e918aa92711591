"""Experiments: many trainings, on this machine or a SLURM cluster, to one report.

- ``experiment``: what is trained, from a file or from options;
- ``training``: one training: its command, and its state by what nnU-Net has written;
- ``preparation``: planning and preprocessing where they are missing;
- ``job``: what runs one training, in a process of its own, with a log;
- ``local``, ``slurm``: where jobs run;
- ``display``: what the terminal shows; ``run``: all of it in order.
"""

from nnunet_lomix.experiments.experiment import Experiment, read_experiment

__all__ = ["Experiment", "read_experiment"]
