"""Whether nnUNetTrainer builds the network that a checkpoint was trained with."""

import pydoc
from collections.abc import Mapping
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_lomix.errors import LoMixError, explaining
from nnunet_lomix.nnunet.trainer_lookup import TrainerNotFound, look_up_trainer

STOCK = nnUNetTrainer.__name__


def check_network(checkpoint: Mapping[str, Any], plans: dict[str, Any], dataset_json: dict[str, Any]) -> str:
    """Check that nnUNetTrainer builds the network of the checkpoint from the plans.

    Args:
        checkpoint: as nnU-Net writes it.
        plans, dataset_json: content of these files.

    Returns:
        By what it was checked, in words: by the class of the trainer, too, or why not by that.

    Raises:
        LoMixError: nnUNetTrainer builds another one.
    """
    name, manager = checkpoint["trainer_name"], PlansManager(plans)
    trained = checkpoint["init_args"].get("configuration")
    if trained not in manager.available_configurations:
        raise LoMixError(f"plans.json has no configuration {trained!r}, which is the one of the checkpoint.")
    refusal = f"The network of {name} is not the one that {STOCK} builds from the plans, so nnU-Net alone can't use it"
    with explaining(f"nnU-Net can't build the network of configuration {trained!r} from plans.json and dataset.json"):
        configuration = manager.get_configuration(trained)
        if (stranger := _find_stranger(configuration)) is not None:
            raise LoMixError(f"{refusal}: {stranger} is not part of nnU-Net.")
        checked = _compare_class(name, refusal)
        network = nnUNetTrainer.build_network_architecture(
            manager,
            configuration,
            determine_num_input_channels(manager, configuration, dataset_json),
            manager.get_label_manager(dataset_json).num_segmentation_heads,
            enable_deep_supervision=False,
        )
    try:
        network.load_state_dict(checkpoint["network_weights"], strict=True)
    except RuntimeError:  # its text lists every weight
        raise LoMixError(f"{refusal}: their weights differ in name or shape.") from None
    return checked


def _compare_class(name: str, refusal: str) -> str:
    """Check that a trainer has nnUNetTrainer's network, as layers without weights don't show in a checkpoint.

    Raises:
        LoMixError: it has its own; begins with ``refusal``.
    """
    try:
        trainer = look_up_trainer(name)
    except TrainerNotFound:
        return f"its weights only, since {name} isn't installed here"
    except LoMixError as error:
        return f"its weights only, since {str(error).rstrip('.')}"
    if trainer.build_network_architecture is not nnUNetTrainer.build_network_architecture:
        raise LoMixError(
            f"{refusal}: {name} has its own build_network_architecture; give it by nnUNetv2_export_model_to_zip to "
            f"people who have installed {name}, too."
        )
    return "its class and its weights"


def _find_stranger(configuration: ConfigurationManager) -> object | None:
    """The first name in the plans of what is no class of layers or networks that nnU-Net brings; None without one.

    nnU-Net imports and calls what the plans name. Whoever has nothing but nnU-Net could not use anything else, and the
    plans of a stranger must not name a function that runs commands.
    """
    kwargs = configuration.network_arch_init_kwargs
    imported = [kwargs.get(key) for key in configuration.network_arch_init_kwargs_req_import]
    for name in (configuration.network_arch_class_name, *imported):
        if name is None:
            continue
        if not isinstance(name, str) or not name.startswith(("torch.nn.", "dynamic_network_architectures.")):
            return name
        found = pydoc.locate(name)
        if not isinstance(found, type) or not issubclass(found, torch.nn.Module):
            return name
    return None
