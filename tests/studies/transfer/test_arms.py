"""The arms of the transfer study against what their names say, on networks of a few units."""

from __future__ import annotations

import pytest
import torch

from meanfield.bench.classifiers import Classifier
from meanfield.finite.statistics import norms
from meanfield.studies.transfer import arms
from meanfield.studies.transfer.arms import ARMS, Draw, Trained
from meanfield.studies.transfer.plan import ended

TINY = ended(Classifier(network="mlp", width=5, samples=60, pool=4, penalty="none", strength=0.0), 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained.of(TINY.variant(scale=0.5), str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def draw(trained, tmp_path_factory):
    store = str(tmp_path_factory.mktemp("others"))
    other = Trained.of(TINY.variant(seed=1), store)
    return Draw.of(trained, 0, other, Trained.of(TINY.variant(labels="permuted"), store))


def same(found, wanted):
    return all(torch.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6) for name in wanted)


def test_sums_are_those_of_their_names(trained, draw):
    start, delta, alpha = trained.before, trained.displacement.delta, 1.5
    end = {name: start[name] + delta[name] for name in start}
    wanted = {
        "own start": {name: start[name] + alpha * delta[name] for name in start},
        "fresh start": {name: draw.fresh[name] + alpha * delta[name] for name in start},
        "zero start": {name: alpha * delta[name] for name in start},
        "trained, scaled": {name: alpha * end[name] for name in start},
        "permuted labels": {name: draw.fresh[name] + alpha * draw.permuted[name] for name in start},
        "start added back": {name: draw.fresh[name] + start[name] + alpha * delta[name] for name in start},
        "two trained": {name: end[name] + alpha * draw.other[name] for name in start},
    }
    assert all(same(ARMS[arm](trained, draw, alpha), parameters) for arm, parameters in wanted.items())


def test_noise_has_the_norms_it_is_named_after_and_is_one_direction_over_alpha(trained, draw):
    start, delta = trained.before, trained.displacement.delta
    for alpha in (1.0, 3.0):
        found = ARMS["literal noise"](trained, draw, alpha)
        noise = {name: found[name] - alpha * (start[name] + delta[name]) for name in trained.drawn}
        for name in trained.drawn:
            wanted = (draw.fresh[name] - alpha * start[name]).norm()
            torch.testing.assert_close(noise[name].norm(), wanted, rtol=1e-4, atol=0)
            cosine = torch.nn.functional.cosine_similarity(noise[name].flatten(), draw.fresh[name].flatten(), 0)
            assert abs(cosine) < 0.9
    for arm, like, rest in (
        ("noise as start", draw.fresh, {name: 2 * delta[name] for name in delta}),
        ("noise as displacement", {name: 2 * delta[name] for name in delta}, draw.fresh),
    ):
        found, again = (ARMS[arm](trained, draw, 2.0) for _ in range(2))
        assert same(found, again)
        for name in trained.drawn:
            noise = found[name] - rest[name]
            torch.testing.assert_close(noise.norm(), like[name].norm(), rtol=1e-4, atol=0)
            assert not torch.allclose(noise, like[name], rtol=0.1)


def test_a_displacement_dealt_anew_has_the_same_entries_and_another_order(trained, draw):
    for arm in ("shuffled", "layers shuffled apart"):
        found = ARMS[arm](trained, draw, 1.0)
        moved = {name: found[name] - trained.before[name] for name in found}
        for name, delta in trained.displacement.delta.items():
            torch.testing.assert_close(moved[name].flatten().sort()[0], delta.flatten().sort()[0], rtol=0, atol=1e-6)
        assert any(not torch.allclose(moved[name], delta) for name, delta in trained.displacement.delta.items())


def test_what_leaves_a_particle_goes_with_it_where_layers_are_in_step(trained, draw):
    last = list(trained.displacement.delta)[-2]
    wanted = trained.displacement.delta[last]
    moved = {arm: ARMS[arm](trained, draw, 1.0)[last] - trained.before[last] for arm in ARMS if "shuffled" in arm}
    assert torch.allclose(moved["layers shuffled apart"], wanted, rtol=0, atol=1e-6)
    assert not torch.allclose(moved["shuffled"], wanted, rtol=0, atol=1e-5)
    apart = (
        (moved["shuffled"].T[:, None] - wanted.T).abs().amax(2)
    )  # of every column of one from every one of the other
    assert float(apart.amin(0).max()) < 1e-6
    assert float(apart.amin(1).max()) < 1e-6


def test_starts_have_the_scale_and_are_none_of_a_training(trained, draw):
    unscaled = TINY.start().state_dict()
    for name in trained.drawn:
        torch.testing.assert_close(trained.before[name], 0.5 * unscaled[name], rtol=0, atol=0)
        deviation = trained.law.deviations[name]
        spread = torch.cat([trained.fresh(number)[name].flatten() for number in range(40)])
        assert spread.std() == pytest.approx(deviation, rel=5 / (2 * spread.numel()) ** 0.5)
    assert len({trained.seed(number) for number in range(3)} & set(range(1000))) == 0
    assert trained.law.deviations.keys() == trained.before.keys()
    squares = [sum(float(each[name].square().sum()) for name in trained.drawn) for each in (trained.before, draw.fresh)]
    moved = sum(float(trained.displacement.delta[name].square().sum()) for name in trained.drawn)
    assert trained.ratio == pytest.approx((squares[0] / moved) ** 0.5, rel=1e-6)


def test_batch_norm_keeps_scales_where_starts_are_none_and_takes_statistics_of_the_images(tmp_path):
    trained = Trained.of(TINY.variant(network="residual_bn", width=2), str(tmp_path))
    draw = Draw.of(trained, 0)
    zero = ARMS["zero start"](trained, draw, 1.0)
    delta = trained.displacement.delta
    assert torch.equal(zero["norm1.weight"], 1 + delta["norm1.weight"])
    assert torch.equal(zero["conv1.weight"], delta["conv1.weight"])
    assert ARMS["shuffled"](trained, draw, 1.0) is None  # a stream has no particles of one layer
    network = trained.at(ARMS["fresh start"](trained, draw, 1.0))
    heard = []
    network.get_submodule("norm1").register_forward_hook(lambda module, inputs, output: heard.append(inputs[0]))
    network(trained.classifier.images().inputs)
    torch.testing.assert_close(norms(network)["norm1"].running_mean, heard[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert all(arm in ARMS for arm in arms.FIXED)
