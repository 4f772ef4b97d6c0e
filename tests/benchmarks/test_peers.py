from dataclasses import replace

import pytest
import torch

import meanfield as mf
from benchmarks import tables
from benchmarks.peers import measure
from meanfield.data import Dataset


@pytest.fixture(scope="module")
def few() -> Dataset:
    """45 digits 0, 1, 2, 30 held out."""
    images = mf.data.load("digits", classes=(0, 1, 2), samples=45)
    assert images.rest is not None
    rest = replace(images.rest, inputs=images.rest.inputs[:30], labels=images.rest.labels[:30])
    return replace(images, rest=rest)


def test_every_contender_is_judged_on_images_held_out(few):
    options = measure.Options(data="digits", samples=45, width=4, steps=40)
    rows = [
        measure.linear(few),
        measure.tangent_kernel(few),
        measure.finite_network(few, options),
        *measure.continuous(few, options),
    ]
    scores = {row["contender"]: row["held_out"] for row in rows}
    assert scores["linear"] > 0.9
    assert scores["convolutional tangent kernel, infinite width"] > 0.9
    flowed, solved = rows[-2:]
    assert solved["value"] < flowed["value"]
    assert 0 <= solved["gap"] < flowed["gap"]
    assert solved["cpu_seconds"] > flowed["cpu_seconds"] > 0
    (table,) = tables.peers({"images": 45, "held_out_images": 30, "rows": rows})
    assert table.row_count == 5


def test_the_regression_is_ridge_regression_and_sees_no_label_it_is_judged_on():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(12) % 3
    gram, fitted, ridge = features @ features.T, slice(0, 8), 0.1
    scores = measure._regressed(gram, labels, ridge, fitted)
    targets = torch.nn.functional.one_hot(labels[fitted]).double()
    strength = ridge * gram[fitted, fitted].diagonal().mean()
    square = features[fitted].T @ features[fitted] + strength * torch.eye(5, dtype=torch.float64)
    weights = torch.linalg.solve(square, features[fitted].T @ (targets - targets.mean(0)))
    torch.testing.assert_close(scores, targets.mean(0) + features @ weights)
    other = labels.clone()
    other[8:] = 0
    assert torch.equal(measure._regressed(gram, other, ridge, fitted), scores)
