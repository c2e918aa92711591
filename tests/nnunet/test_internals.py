"""That the inner parts of nnU-Net are as they were when they were read."""

import pytest
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from nnunet_lomix.nnunet.internals import draw_progress, set_logged


class Trainer:
    def __init__(self, folder):
        self.logger = MetaLogger(str(folder), resume=False)


def test_a_new_name_is_logged_and_is_in_the_checkpoint(tmp_path):
    trainer = Trainer(tmp_path)
    set_logged(trainer, "mine", [{}])
    trainer.logger.log("mine", {"z_0": 1.0}, 1)
    assert trainer.logger.get_value("mine", step=None) == trainer.logger.get_checkpoint()["mine"] == [{}, {"z_0": 1.0}]


@pytest.mark.parametrize("log", [{}, {"train_losses": 3}, None])
def test_of_a_log_that_is_none_nothing_is_drawn(tmp_path, log):
    draw_progress(log, tmp_path)
    assert not list(tmp_path.iterdir())
