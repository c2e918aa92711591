"""All that this package knows of nnU-Net's files, folders and commands, each thing once.

- :mod:`~nnunet_lomix.nnunet.registration`, ``lookup/``: how nnU-Net finds the trainers;
- :mod:`~nnunet_lomix.nnunet.trainer_lookup`: which class nnU-Net takes for the name of a trainer;
- :mod:`~nnunet_lomix.nnunet.datasets`: environment variables, names and folders of datasets, ``splits_final.json``;
- :mod:`~nnunet_lomix.nnunet.planning`: plans and preprocessed data, and the commands that make what is missing;
- :mod:`~nnunet_lomix.nnunet.refusals`: what a trainer refuses for a plan;
- :mod:`~nnunet_lomix.nnunet.results`: what a training leaves in its results folder;
- :mod:`~nnunet_lomix.nnunet.checkpoints`: reading checkpoints safely;
- :mod:`~nnunet_lomix.nnunet.curves`: learning curves, from the log in checkpoints;
- :mod:`~nnunet_lomix.nnunet.segmentations`: labels, and where voxels are, by nnU-Net's readers;
- :mod:`~nnunet_lomix.nnunet.network`, :mod:`~nnunet_lomix.nnunet.prediction`: what a trained model is, and predicts;
- :mod:`~nnunet_lomix.nnunet.commands`: running nnU-Net's commands;
- :mod:`~nnunet_lomix.nnunet.internals`: what nnU-Net doesn't promise to keep.

``import torch`` imports this package on the way to :mod:`~nnunet_lomix.nnunet.registration`, so nothing heavy may be
imported here.
"""
