"""Errors of a graft, layer by layer, against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from strategies import normal
from torch_networks import IMAGES, plain, residual

from meanfield.grafting import graft, layer_errors
from meanfield.grafting.errors import Discrepancy

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def test_errors_of_every_later_layer_against_their_definition():
    lower, upper = plain(5, 0), plain(6, 1)
    held_out = normal((300, 2, 12, 12), 7)
    found = graft(lower, upper, "5", IMAGES)
    errors = layer_errors(found, upper, held_out)
    assert list(errors) == ["5", "8", "10", "12"]
    ours = found.network.connection(lower[:5](held_out)).detach()
    for name, error in errors.items():
        theirs = upper[: int(name) + 1](held_out).detach()
        reached = upper[6 : int(name) + 1](ours).detach()
        axes = (0, 2, 3) if theirs.ndim == 4 else (0,)
        expected = (reached - theirs).square().sum() / (theirs - theirs.mean(axes, keepdim=True)).square().sum()
        assert error == pytest.approx(float(expected), rel=1e-10)
    block = graft(residual(4, 0), residual(4, 1), "stage1.1", normal((30, 2, 12, 12), 0))
    names = list(layer_errors(block, residual(4, 1), normal((30, 2, 12, 12), 0)))
    assert names == [
        "stage1.1",
        "stage1.1.conv1",
        "stage1.1.conv2",
        "stage2.0.conv1",
        "stage2.0.conv2",
        "stage2.0.down",
        "head",
    ]
    assert layer_errors(block, residual(4, 1), normal((30, 2, 12, 12), 0))["stage1.1"] == pytest.approx(
        block.error, rel=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_targets_have_no_relative_error(dtype):
    upper = plain(5, 1).to(dtype)
    with torch.no_grad():
        upper[10].weight.zero_()
        upper[10].bias.fill_(0.3)
    found = graft(plain(5, 0).to(dtype), upper, "10", IMAGES.to(dtype))
    assert np.isnan(found.error)
    assert np.isnan(layer_errors(found, upper, IMAGES.to(dtype))["10"])


@pytest.mark.parametrize(("shape", "axes"), [((90, 3, 4, 5), (0, 2, 3)), ((90, 3), (0,)), ((90, 4, 3), (0, 1))])
@pytest.mark.parametrize("sizes", [(90,), (1, 88, 1), (30, 60)])
def test_a_discrepancy_in_pieces_is_that_of_all(shape, axes, sizes):
    """Channels of very different means; the sums run over all of them."""
    channel = torch.tensor([0.0, 1e4, -3.0])
    wanted = normal(shape, 1) + (channel[:, None, None] if len(shape) == 4 else channel)
    found = wanted + 0.3 * normal(shape, 2)
    pieces = Discrepancy()
    for ours, theirs in zip(found.split(sizes), wanted.split(sizes)):
        pieces.add(ours, theirs)
    expected = (found - wanted).square().sum() / (wanted - wanted.mean(axes, keepdim=True)).square().sum()
    assert pieces.relative == pytest.approx(float(expected), rel=1e-10)


def test_a_discrepancy_from_a_constant_or_from_nothing_is_undefined():
    flat = Discrepancy()
    for size in (3, 5):
        flat.add(normal((size, 2), 0), torch.full((size, 2), 0.1, dtype=torch.float64))
    assert np.isnan(flat.relative)
    assert np.isnan(Discrepancy().relative)
    with pytest.raises(ValueError, match="inputs are empty"):
        layer_errors(graft(plain(5, 0), plain(5, 1), "10", IMAGES), plain(5, 1), IMAGES[:0])
