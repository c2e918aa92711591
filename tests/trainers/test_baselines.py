"""The trainers of the baselines, and LoMix's own defaults, on preprocessed generated data."""

import pytest
import torch

from nnunet_lomix import trainers

from .conftest import Tiny, train_steps

pytestmark = pytest.mark.end_to_end


@pytest.mark.parametrize(
    "name, maps, total, stride, share, terms",
    [
        ("nnUNetTrainerLoMix", 19, 1, 2, 0.5, (1, 1, False)),
        ("nnUNetTrainerLoMixFixedWeights", 19, 1, 1, 0, (1, 1, False)),
        ("nnUNetTrainerLoMixPaper", 19, 19 * 0.6931, 1, 0, (0.3, 0.7, True)),
        ("nnUNetTrainerAdditiveMix", 7, 1, 1, 0, (1, 1, False)),
        ("nnUNetTrainerEqualDeepSupervision", 3, 1, 1, 0, (1, 1, False)),
    ],
)
def test_every_trainer_trains(make, name, maps, total, stride, share, terms):
    trainer = make(type(name, (Tiny, getattr(trainers, name)), {}))
    loss = trainer.loss
    assert (len(loss.maps), loss.stride, loss.share) == (maps, stride, share)
    assert (loss.criterion.weight_ce, loss.criterion.weight_dice, loss.criterion.paper_dice) == terms
    assert float(loss.weights().sum()) == pytest.approx(total, rel=1e-4)
    before = {key: p.clone() for key, p in loss.named_parameters()}
    train_steps(trainer, 2)
    assert all(not torch.equal(before[key], p) for key, p in loss.named_parameters())
    if trainer.rule == "equal":
        assert loss.weights().unique().tolist() == [pytest.approx(1 / maps)]
    assert all(p.isfinite().all() for p in trainer.network.parameters())
