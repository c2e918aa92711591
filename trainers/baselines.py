"""The baselines of the paper, and its own rule: what nnUNetTrainerLoMix is compared with.

All supervise each map on every pixel of the full-resolution target, as the paper does; nnU-Net's own deep supervision
compares each output with a target of its own resolution.
"""

from nnunet_lomix.trainers.lomix import nnUNetTrainerLoMix

# What a map costs in the authors' code. With squared denominators a nearly perfect map costs much less than by
# nnU-Net's Dice, so the weights are learned otherwise.
PAPER_TERMS = {"weight_ce": 0.3, "weight_dice": 0.7, "paper_dice": True}


class nnUNetTrainerLoMixFixedWeights(nnUNetTrainerLoMix):
    """All maps of LoMix, each with the same fixed weight."""

    rule = "equal"
    anchor = "z_0"
    share = 0.0
    stride = 1


class nnUNetTrainerAdditiveMix(nnUNetTrainerLoMixFixedWeights):
    """Equally weighted additive mixing: the outputs and their sums, each with the same fixed weight."""

    operators = ("add",)


class nnUNetTrainerEqualDeepSupervision(nnUNetTrainerLoMixFixedWeights):
    """Deep supervision with equal weights: the outputs alone, each with the same fixed weight."""

    operators = ()


class nnUNetTrainerLoMixPaper(nnUNetTrainerLoMix):
    """The paper's rule: free softplus weights on its 0.3 CE + 0.7 (1 − Dice), AdamW with 1e-4. For comparisons only.

    The network keeps nnU-Net's own optimiser. The weights fade and the training suffers; see docs/method.md.
    """

    rule = "softplus"
    anchor = "z_0"
    share = 0.0
    stride = 1
    weight_ce, weight_dice, paper_dice = PAPER_TERMS.values()
    weights_lr = 1e-4
    fusion_lr = 1e-4
    loss_weight_decay = 1e-4
