"""Statistics of batch norm over images: those of one pass in training mode with all of them."""

import copy

import pytest
import torch
from strategies import normal
from torch import nn
from torch_networks import SMALL, normed, normed_blocks
from torch_networks import residual as users

from meanfield import limits
from meanfield.finite.statistics import norms, recompute, settle
from meanfield.validation import Misuse

NETWORKS = [(normed(4, 0), SMALL), (normed_blocks(4, 0), SMALL), (users(3, 0).eval(), normal((40, 2, 12, 12), 1))]


@pytest.mark.parametrize(("network", "images"), NETWORKS)
@pytest.mark.parametrize("block", [None, 64])  # at once; batch norm by batch norm
def test_evaluation_is_then_training_with_all_images_in_one_batch(network, images, block, monkeypatch):
    if block is not None:
        monkeypatch.setattr(limits, "BLOCK_BYTES", block)
    found, training = copy.deepcopy(network), copy.deepcopy(network).train()
    for module in training.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    recompute(found, images.split(15))
    assert not found.training
    with torch.no_grad():
        torch.testing.assert_close(found(images), training(images), rtol=1e-9, atol=1e-11)
        # a step of the momentum towards the same means and variances, these over one less
        for norm, (mine, own) in zip(norms(found).values(), zip(norms(training).values(), norms(network).values())):
            mean = (mine.running_mean - (1 - mine.momentum) * own.running_mean) / mine.momentum
            torch.testing.assert_close(norm.running_mean, mean, rtol=1e-9, atol=1e-11)
    assert norms(found).keys() == norms(training).keys() != set()


def test_images_stay_where_the_first_module_works_in_place():
    images = normal((12, 3), 0)
    recompute(nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(3).double()).eval(), [images])
    assert torch.equal(images, normal((12, 3), 0))


def test_of_no_batch_norm_nothing_is_asked_and_of_one_called_twice_no_statistics():
    recompute(nn.Linear(2, 2), [torch.ones(3, 5)])
    norm = nn.BatchNorm1d(2)
    with pytest.raises(Misuse, match="b='0' is a batch norm that is called twice"):
        recompute(nn.Sequential(norm, nn.ReLU(), norm).eval(), [torch.ones(3, 2)], "b")
    unused = nn.Sequential(nn.Linear(2, 2))
    unused.register_module("aside", nn.Identity())
    unused.aside.norm = norm
    settle({}, unused, {}, [torch.ones(3, 2)], lambda *_: None)
    recompute(unused.eval(), [torch.ones(3, 2)])
    assert not norm.running_mean.any()
