"""Networks at equal training loss: closed cases, and a real training."""

import math

import pytest
import torch
from torch import nn

from meanfield.bench.classifiers import Classifier
from meanfield.finite import evaluate
from meanfield.studies.landscape.equal_loss import at_loss, between, passing

TINY = Classifier(
    network="residual_bn", width=2, samples=120, penalty="none", strength=0.0, epochs=3, checkpoints=(0, 1, 2, 3)
)


def line(weight):
    layer = nn.utils.skip_init(nn.Linear, 1, 1, dtype=torch.float64)
    layer.load_state_dict({"weight": torch.tensor([[weight]]), "bias": torch.zeros(1)})
    return layer


def test_the_share_is_that_of_a_closed_case():
    """Loss w^2 on the way from w = 4 to w = 1 is 9 at w = 3, a third of the way."""
    below = line(1.0)
    share = passing(lambda network: float(network.weight.detach().square()), line(4.0), below, 9.0)
    assert share == pytest.approx(1 / 3, abs=1e-6)
    assert float(below.weight.detach()) == pytest.approx(3.0, abs=1e-5)


def test_a_checkpoint_that_has_the_loss_is_taken():
    below = line(1.0)
    assert passing(lambda network: float(network.weight.detach().square()), line(4.0), below, 1.0) == 1.0
    assert float(below.weight.detach()) == 1.0


def test_running_statistics_lie_between_and_counts_are_the_second_s():
    first, second = nn.BatchNorm2d(1).state_dict(), nn.BatchNorm2d(1).state_dict()
    second |= {"running_mean": torch.tensor([2.0]), "num_batches_tracked": torch.tensor(7)}
    found = between(first, second, 0.25)
    assert (float(found["running_mean"]), int(found["num_batches_tracked"])) == (0.5, 7)


def test_a_training_is_taken_where_it_first_has_the_loss(tmp_path):
    images = TINY.images()
    losses = [evaluate(TINY.at(epoch, tmp_path), images.inputs, images.labels).loss for epoch in TINY.checkpoints]
    assert losses[0] > losses[1] > min(losses)  # the case is one
    target = math.sqrt(losses[0] * losses[1])
    found = at_loss(TINY, tmp_path, target)
    assert 0 < found.epoch < 1
    assert found.loss == pytest.approx(target, rel=1e-5)
    assert evaluate(found.network, images.inputs, images.labels).loss == found.loss
    assert at_loss(TINY, tmp_path, 1e-9) is None
    start = at_loss(TINY, tmp_path, 2 * losses[0])
    assert (start.epoch, start.loss) == (0, losses[0])
