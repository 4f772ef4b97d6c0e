"""Activations: shipped ones are what they say, a false declaration is named, a function of one's own goes the way."""

import copy
import json
import math
import pickle
from contextlib import nullcontext

import pytest
import torch
from strategies import normal, seeded
from torch import nn

import meanfield as mf
from meanfield import certificates, finite, starts, transfer
from meanfield.activations import ACTIVATIONS, Activation
from meanfield.landscape import balanced
from meanfield.landscape.caution import not_homogeneous
from meanfield.solvers import flow, splitting

FORMULAS = {  # plain arithmetic, by their definitions
    "relu": lambda g: max(g, 0.0),
    "leaky_relu": lambda g: g if g > 0 else 0.01 * g,
    "identity": lambda g: g,
    "tanh": math.tanh,
    "hardtanh": lambda g: min(max(g, -1.0), 1.0),
    "sin": math.sin,
    "erf": math.erf,
    "softplus": lambda g: max(g, 0.0) + math.log1p(math.exp(-abs(g))),
    "gelu": lambda g: 0.5 * g * math.erfc(-g / math.sqrt(2)),
    "silu": lambda g: g / (1 + math.exp(-g)),
}


def cube(g):
    return g**3


def soft_sign(g):
    return g / (1 + g.abs())


def two_slopes(g):
    return torch.where(g > 0, 0.5 * g, 0.2 * g)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shipped_activation_is_its_formula_and_what_its_record_says(name, dtype):
    record, g = ACTIVATIONS[name], torch.linspace(-8, 8, 65, dtype=dtype)
    h = record.function
    assert (record.name, mf.Conv(activation=name).h, h(g).dtype) == (name, record, dtype)
    assert torch.equal(record.module()(g), h(g))
    expected = torch.tensor([FORMULAS[name](float(each)) for each in g], dtype=dtype)
    torch.testing.assert_close(h(g), expected, rtol=1e-5, atol=1e-7 if dtype == torch.float64 else 1e-6)
    assert record.bounded == bool(h(1e9 * g).abs().max() <= 1.01 * h(1e6 * g).abs().max())
    assert record.gain == {"relu": 2, "gelu": 2, "silu": 2, "leaky_relu": 2 / (1 + 0.01**2)}.get(name, 1)
    assert record.homogeneous == all(torch.allclose(h(t * g), t * h(g)) for t in (0.0, 0.3, 7.0))
    if record.recession is not None:
        limit = ACTIVATIONS[record.recession]
        assert limit.homogeneous
        torch.testing.assert_close(h(1e6 * g) / 1e6, limit.function(g), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_derivative_bound_is_reached_to_a_thousandth(name):
    g = torch.linspace(-8, 8, 160001, dtype=torch.float64)
    steepest = float((ACTIVATIONS[name].function(g).diff() / g.diff()).abs().max())
    assert 0.999 * ACTIVATIONS[name].derivative_bound <= steepest <= ACTIVATIONS[name].derivative_bound * (1 + 1e-9)


@pytest.mark.parametrize(
    ("function", "facts", "message"),
    [
        (
            torch.erf,
            {"derivative_bound": 1.128},
            r"derivative_bound=1.128 is false .*'erf'.* reaches 1.12838 at g=.*e-",
        ),
        (nn.functional.silu, {"derivative_bound": 1.09}, r"derivative_bound=1.09 .* reaches 1.09984 at g=2.4"),
        (cube, {"derivative_bound": 50.0}, r"derivative_bound=50.0 .*'cube'.* reaches 3e\+12"),
        (torch.frac, {"derivative_bound": 1.0}, "derivative_bound=1.0"),  # jumps, which torch's derivative does not see
        (cube, {"bounded": True}, r"bounded=True is false .*'cube': \|h\| reaches 1e\+18 .* 1e\+36"),
        (torch.asinh, {"bounded": True}, r"bounded=True .* reaches 14.51 .* 28.32"),
        (
            nn.functional.gelu,
            {"homogeneous": True},
            r"homogeneous=True .*h\(0.3 g\) and 0.3 h\(g\) differ by 0.1509 at g=-2",
        ),
        (soft_sign, {"recession": "relu"}, r"recession='relu' .* relu\(g\) differ by 40 at g=40"),
        (torch.sin, {"recession": "tanh"}, "recession='tanh' is unknown: choose one of 'relu'"),
        (lambda g: g.softmax(0), {"name": "share"}, "function='share' must act on every entry by itself"),
        (lambda g: g.detach(), {"name": "cut"}, "function='cut' must be written in operations that torch differ"),
        (lambda g: g.sum(), {"name": "total"}, r"function='total' must give a tensor of the shape"),
        (lambda g: g.double(), {"name": "wide"}, "function='wide' must give a tensor .* torch.float32"),
        (torch.log, {}, r"function='log' must be finite on \[-40, 40\], and is not at g="),
        (lambda g: g, {}, "name='<lambda>' must name the activation"),
        (torch.sin, {"bounded": True, "homogeneous": True}, "at most one of the three"),
        (torch.sin, {"bounded": 1}, "bounded=1 must be True or False"),
        (torch.sin, {"derivative_bound": -1.0}, "derivative_bound=-1.0"),
        (3, {"name": "three"}, "function=3 must be a function"),
        (nn.functional.relu, {"bounded": True}, "bounded=True"),
        (lambda g: (-g).relu(), {"name": "mirrored", "bounded": True}, "bounded=True"),
        (lambda g: (g + 1e-6).relu(), {"name": "shifted", "homogeneous": True}, "homogeneous=True"),
        (nn.functional.leaky_relu, {"recession": "relu"}, "recession='relu' .* differ by 0.4 at g=-40"),
        (lambda g: g.clamp_min(-50) + 3 * (g + 50).clamp_max(0), {"name": "far", "derivative_bound": 1.0}, "reaches 3"),
        (math.tanh, {}, "function='tanh' fails on a tensor of dtype torch.float64"),
        (torch.relu_, {}, "function='relu_' fails on .* in-place"),
        (torch.sin, {"layer": nn.Tanh}, "layer=.*Tanh.* is another function than 'sin'"),
        (torch.tanh, {"layer": nn.Tanh()}, r"layer=Tanh\(\) must make an nn.Module"),
        (lambda g: -2 * g, {"name": "steep", "derivative_bound": 1.0}, "derivative_bound=1.0 .* reaches 2 "),
    ],
)
def test_what_is_false_is_refused_by_its_name(function, facts, message):
    with pytest.raises(ValueError, match=message):
        Activation(function, **facts)


def test_a_name_belongs_to_one_function():
    with pytest.raises(ValueError, match="activation='relu' is the name of another activation"):
        mf.Conv(activation=Activation(cube, name="relu"))
    assert mf.Conv(activation=cube) == mf.Conv(activation=Activation(cube))
    assert mf.Conv(activation=torch.tanh) == mf.Conv(activation="tanh")
    with pytest.raises(ValueError, match="activation=3 is unknown"):
        mf.Conv(activation=3)


def test_activations_travel_between_processes():
    for each in (*ACTIVATIONS.values(), Activation(soft_sign, bounded=True)):
        assert pickle.loads(pickle.dumps(each)) == copy.deepcopy(each) == each


def problem(activation, depth=1, **penalty):
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2, padding=1, activation=activation),) * depth)
    return mf.Problem(
        arch, normal((6, 1, 3, 3), 0), normal((6,), 1), "squared", mf.Penalty(readout=0.02, input=0.02, **penalty)
    )


def test_warnings_stand_on_what_is_declared():
    assert problem(cube).missing_bounds() == ["input_bound"]
    assert problem(cube, input_bound=1.0).missing_bounds() == []
    assert problem(Activation(soft_sign, bounded=True), 2).missing_bounds() == []
    assert problem(soft_sign, 2).missing_bounds() == ["input_bound", "amplitude_bound"]
    for facts in ({"derivative_bound": 1.0}, {"bounded": True}):
        assert problem(Activation(soft_sign, **facts)).missing_bounds() == []
    assert problem(Activation(nn.functional.silu, recession="relu", name="mine")).missing_bounds() == []


def searched(problem, output):
    return certificates.search_features(problem, output, starts=8, steps=30)


def test_a_bound_over_all_measures_stands_on_the_derivative():
    """Two slopes are homogeneous; known by their steepest alone, the scale of r and the bound are less, and right."""
    output = -0.1 * normal((6, 1), 1)
    known = searched(problem(Activation(two_slopes, homogeneous=True)), output)
    steep = searched(problem(Activation(two_slopes, derivative_bound=0.5)), output)
    unknown = searched(problem(two_slopes), output)
    assert unknown.bound == -math.inf
    assert "input_bound" in unknown.reason
    # by hand: |q| <= 1/2 sum_n |r_n| mean_q |x_nq|
    rows = problem(cube).architecture.layers[0].patches(problem(cube).inputs)
    limit = 2 * 0.02 / (0.5 * float(output.abs()[:, 0] @ rows.norm(dim=2).mean(1)))
    assert 0 < steep.scale <= limit < known.scale
    assert 0 < steep.bound < known.bound


def test_a_function_of_ones_own_goes_the_whole_way(tmp_path):
    mine = Activation(soft_sign, bounded=True, derivative_bound=1.0)
    given = problem(mine, 2, source=0.01)
    start = starts.draw(given, (6, 4), seeded(), "low_rank")
    found = splitting.solve(mf.ConvexProgram.freeze(given, start), 1e-6)
    assert -1e-12 <= found.gap <= 1e-6 * found.value
    module = finite.sequential(found.network)
    assert "soft_sign1" in dict(module.named_children())
    torch.testing.assert_close(module(given.inputs), found.network(given.inputs))
    assert isinstance(finite.train(given, (4, 3), steps=5).value, float)
    assert list(not_homogeneous(found.network)) == ["soft_sign in layers.0", "soft_sign in layers.1"]
    mf.save_network(found.network, tmp_path / "network.safetensors")
    with pytest.raises(ValueError, match=r"activations=\(\) must hold 'soft_sign'.* holds its name alone"):
        mf.load_network(tmp_path / "network.safetensors")
    with pytest.raises(ValueError, match="activations='soft_sign' is another function"):
        mf.load_network(tmp_path / "network.safetensors", [Activation(cube, name="soft_sign")])
    far = Activation(lambda g: torch.where(g > 9, 0 * g, soft_sign(g)), name="soft_sign")  # other from 9 on
    with pytest.raises(ValueError, match="activations='soft_sign' is another function"):
        mf.load_network(tmp_path / "network.safetensors", [far])
    kept = mf.load_network(tmp_path / "network.safetensors", [mine])
    assert kept.architecture == given.architecture
    assert torch.equal(kept(given.inputs), found.network(given.inputs))
    with pytest.raises(ValueError, match=r"activations=\(\) must hold 'soft_sign'"):
        mf.Architecture.from_dict(json.loads(json.dumps(given.architecture.to_dict())))


def test_a_run_goes_on_with_the_function_that_it_began_with(tmp_path):
    for function in (soft_sign, lambda g: 2 * soft_sign(g)):
        given = problem(Activation(function, name="mine"), input_bound=1.0)
        start, again = starts.draw(given, (3,), seeded(), "low_rank"), function is not soft_sign
        expected = pytest.raises(ValueError, match=r"of another run: its activations\.mine") if again else nullcontext()
        with expected, mf.limits.within(seconds=0):
            flow.solve(given, start, steps=50, state=tmp_path / "run.safetensors")


def test_a_homogeneous_one_balances_and_others_do_not():
    given = problem(Activation(two_slopes, homogeneous=True), 2, input_bound=3.0, amplitude_bound=3.0)
    network = starts.draw(given, (3, 2), seeded(), "low_rank")
    torch.testing.assert_close(balanced(network)(given.inputs), network(given.inputs))
    with pytest.raises(ValueError, match=r"layers.0 \(two_slopes\)"):
        balanced(starts.draw(problem(two_slopes, 2), (3, 2), seeded(), "low_rank"))


@pytest.mark.parametrize("make", [finite.mlp, finite.cnn, finite.residual])
def test_classifiers_take_the_object(make):
    network = make((1, 6, 6), 3, activation=Activation(soft_sign, bounded=True), generator=seeded())
    assert "soft_sign1" in dict(network.named_children())
    assert torch.equal(network.soft_sign1(torch.ones(2)), 0.5 * torch.ones(2))
    with pytest.raises(ValueError, match="activation='soft_sigm' is unknown"):
        make((1, 6, 6), 3, activation="soft_sigm", generator=seeded())


def test_a_prediction_knows_it():
    """tanh by its formula is predicted as torch's own is."""
    predicted = []
    for activation in ("tanh", Activation(lambda g: 1 - 2 / (1 + (2 * g).exp()), bounded=True, name="mine")):
        network = finite.cnn((1, 3, 3), 2, width=3, activation=activation, generator=seeded(), dtype=torch.float64)
        law = transfer.StartLaw.he(network, gain=1.0)
        moved = transfer.Displacement.between(law.draw(network, seeded(1)), law.draw(network, seeded(2)))
        predicted.append(transfer.predict(moved, law, normal((3, 1, 3, 3), 0)))
    torch.testing.assert_close(*predicted)
