import math
from dataclasses import replace

import numpy as np
import pytest
import reference as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from strategies import SMOOTH, architectures, bounded, cases, random_inputs, random_network, random_targets, seeded

import meanfield as mf
from meanfield import limits
from meanfield.problem import project_bounds

ARCH = mf.Architecture((1, 3, 3), (mf.Conv(2, bias=True), mf.Conv(2, bias=True)))
smooth = architectures(activations=SMOOTH, poolings=("none", "average"))


@given(cases(zero_mass=(False, True)))
def test_terms_match_the_explicit_sums(case):
    np.testing.assert_allclose(
        case.problem.terms(case.network), slow.objective_terms(case.problem, case.network), rtol=1e-11, atol=1e-13
    )


@given(cases())
def test_value_is_the_sum_of_the_terms_where_the_bounds_hold(case):
    assert case.problem.value(case.network) == sum(case.problem.terms(case.network))
    output = case.network(case.problem.inputs)
    assert case.problem.terms(case.network, output).loss == case.problem.terms(case.network).loss


@given(cases(images=(5, 5)))
def test_blocks_of_images_change_nothing(case):
    whole = case.problem.terms(case.network)
    slices = [slice(0, 2), slice(2, 4), slice(4, 5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "blocks", lambda count, *_: iter(slices))
        parts = case.problem.terms(case.network)
        leaf = case.network.map(lambda t: t.clone().requires_grad_())
        assert case.problem.terms(leaf).loss.requires_grad
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


@given(cases(archs=smooth), st.integers(0, 3))
def test_gradient_of_every_term_matches_finite_differences(case, term):
    network = case.network.map(lambda t: t.clone().requires_grad_())
    tensors = network.tensors()
    value = case.problem.terms(network)[term] + sum(0 * tensor.sum() for tensor in tensors)  # a term may be constant
    gradients = torch.autograd.grad(value, tensors)
    step = 1e-5
    for index, (tensor, gradient) in enumerate(zip(tensors, gradients)):
        direction = torch.randn(tensor.shape, generator=seeded(case.seed + index), dtype=tensor.dtype)
        ends = []
        for sign in (1, -1):
            moved = [t + sign * step * direction if k == index else t for k, t in enumerate(case.network.tensors())]
            ends.append(case.problem.terms(mf.measures.with_tensors(case.network, moved))[term])
        expected = (gradient * direction).sum().item()
        size = max(1.0, *(end.item() for end in ends))
        # rounding eps / step, truncation step^2
        assert ((ends[0] - ends[1]) / (2 * step)).item() == pytest.approx(expected, rel=1e-6, abs=1e-7 * size)


@given(cases(bounds=(1.3,)))
def test_bounds_report_what_the_particles_reach(case):
    network, penalty = case.network, case.problem.penalty
    amplitudes = []
    for layer in range(1, network.architecture.depth):
        w, p = network.kernels[layer].numpy(), network.masses[layer - 1].numpy()
        amplitudes += [sum(slow.kernel_norm(row[i], penalty) * p[i] for i in range(len(p))) for row in w]
        amplitudes += [] if network.biases[layer] is None else network.biases[layer].abs().tolist()
    first = [math.sqrt(slow.input_cost(network, i)) for i in range(network.widths[0])]
    expected = [("input_bound", max(first))] + ([("amplitude_bound", max(amplitudes))] if amplitudes else [])
    found = case.problem.bounds(network)
    assert [(name, pytest.approx(reached, rel=1e-12)) for name, reached, _ in found] == expected
    assert all(reached * 1.3 == pytest.approx(bound, rel=1e-12) for _, reached, bound in found if bound != 1.3)
    assert case.problem.excess(network) < 0


def over_bound(name, factor):
    network = random_network(ARCH, (3, 2), 0)
    free = mf.Problem(
        ARCH, random_inputs(ARCH, 2, 0), [0.0, 1.0], penalty=mf.Penalty(amplitude_bound=1.0, input_bound=1.0)
    )
    reached = {bound: value for bound, value, _ in free.bounds(network)}[name]
    penalty = mf.Penalty(**{name: reached / factor})
    return mf.Problem(ARCH, free.inputs, free.targets, penalty=penalty), network


@pytest.mark.parametrize("name", ["amplitude_bound", "input_bound"])
def test_a_broken_bound_makes_the_value_infinite_and_is_named(name):
    problem, network = over_bound(name, 1 + 1e-6)
    assert problem.value(network).item() == math.inf
    assert problem.excess(network) == pytest.approx(1e-6, rel=1e-3)
    with pytest.raises(ValueError, match=rf"{name}=.* makes the network infeasible: it reaches"):
        problem.require_feasible(network)


@pytest.mark.parametrize("name", ["amplitude_bound", "input_bound"])
def test_rounding_at_a_bound_is_forgiven(name):
    problem, network = over_bound(name, 1 + 1e-9)
    assert problem.value(network).isfinite()
    assert problem.require_feasible(network) is None


def test_massless_particles_may_exceed_a_bound():
    network = random_network(ARCH, (3, 2), 0, zero_mass=True)
    kernels = [w.clone() for w in network.kernels]
    kernels[0][-1] *= 1e6
    kernels[1][-1] *= 1e6
    heavy = mf.ParticleNetwork(ARCH, network.masses, kernels, network.readout, network.biases)
    problem = mf.Problem(
        ARCH, random_inputs(ARCH, 2, 0), [0.0, 1.0], penalty=mf.Penalty(amplitude_bound=100.0, input_bound=100.0)
    )
    assert problem.value(heavy).isfinite()


@given(
    cases(archs=architectures(depths=(1,), activations=("relu",), biases=(False, True)), bounds=(None,)),
    st.floats(0.1, 10),
)
def test_one_layer_relu_is_homogeneous(case, scale):
    network = case.network
    bias = None if network.biases[0] is None else [scale * network.biases[0]]
    moved = mf.ParticleNetwork(
        network.architecture, network.masses, [scale * network.kernels[0]], network.readout / scale, bias
    )
    torch.testing.assert_close(moved(case.problem.inputs), network(case.problem.inputs), rtol=1e-11, atol=1e-11)


@given(cases(archs=architectures(depths=(1,), activations=("relu",)), bounds=(None,)), st.floats(0.05, 0.95))
def test_one_layer_relu_value_survives_scaled_masses(case, a):
    """Masses times a, (z, u) divided by sqrt(a), and the rest of the mass on a zero particle."""
    network, root = case.network, math.sqrt(a)
    bias = (
        None
        if network.biases[0] is None
        else [torch.cat([network.biases[0] / root, torch.zeros(1, dtype=torch.float64)])]
    )
    kernels = torch.cat([network.kernels[0] / root, torch.zeros_like(network.kernels[0][:1])])
    readout = torch.cat([network.readout / root, torch.zeros_like(network.readout[:, :1])], 1)
    masses = torch.cat([a * network.masses[0], torch.tensor([1 - a], dtype=torch.float64)])
    moved = mf.ParticleNetwork(network.architecture, [masses], [kernels], readout, bias)
    torch.testing.assert_close(case.problem.value(moved), case.problem.value(network), rtol=1e-11, atol=1e-11)


@given(cases())
def test_relabelling_the_images_changes_nothing(case):
    order = torch.randperm(len(case.problem.inputs), generator=seeded(case.seed))
    shuffled = case.problem.batch(order)
    torch.testing.assert_close(shuffled.value(case.network), case.problem.value(case.network), rtol=1e-12, atol=1e-13)


@given(cases())
def test_losses_of_single_images_average_to_the_loss(case):
    single = [case.problem.batch(torch.tensor([n])).terms(case.network).loss for n in range(len(case.problem.inputs))]
    torch.testing.assert_close(
        torch.stack(single).mean(), case.problem.terms(case.network).loss, rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_float32_agrees_with_float64(loss, norm, device):
    arch = replace(ARCH, outputs=3)
    penalty = mf.Penalty(source=0.1, readout=0.1, input=0.1, kernel_norm=norm)
    problem = mf.Problem(arch, random_inputs(arch, 4, 0), random_targets(loss, 3, 4, 0), loss, penalty)
    network = random_network(arch, (3, 2), 0)
    single = problem.to(dtype=torch.float32, device=device).value(network.to(dtype=torch.float32, device=device))
    assert single.dtype == torch.float32
    assert single.device.type == device.type
    assert single.item() == pytest.approx(problem.value(network).item(), rel=1e-5)


def test_arrays_lists_and_integers_are_converted():
    problem = mf.Problem(ARCH, np.ones((2, 1, 3, 3), dtype=np.uint8), [1, 2])
    assert problem.inputs.dtype == problem.targets.dtype == torch.float64
    assert problem.targets.shape == (2, 1)
    assert mf.Problem(ARCH, np.ones((2, 1, 3, 3), dtype=np.float32), [1, 2]).targets.dtype == torch.float32


def test_repr_names_loss_and_size():
    assert repr(mf.Problem(ARCH, torch.zeros(2, 1, 3, 3), [1, 2])).startswith(
        "Problem(2 images, squared loss, Architecture("
    )


def nearest(rows, masses, bound, norm):
    """argmin sum_i p_i |w_i - v_i|^2 over sum_i p_i |v_i| <= bound, by a root of the amount by which entries shrink."""
    if sum(p * slow.kernel_norm(w, norm) for p, w in zip(masses, rows)) <= bound:
        return rows

    def shrunk(theta):
        if norm.kernel_norm == "l1":
            return np.sign(rows) * np.maximum(np.abs(rows) - theta, 0)
        return np.array([w * max(0.0, 1 - theta / slow.kernel_norm(w, norm)) for w in rows])

    excess = lambda theta: sum(p * slow.kernel_norm(v, norm) for p, v in zip(masses, shrunk(theta))) - bound  # noqa: E731
    return shrunk(optimize.brentq(excess, 0, np.abs(rows).sum(), xtol=1e-14))


@given(cases(bounds=(None,), archs=architectures(sides=(2, 4))), st.sampled_from([0.1, 0.6, 5.0]))
def test_projection_on_the_bounds_is_the_nearest_network(case, factor):
    """Feature by feature; masses and readout stay."""
    penalty = bounded(case.problem.penalty, case.network, factor, factor)
    problem = mf.Problem(
        case.problem.architecture, case.problem.inputs, case.problem.targets, case.problem.loss.name, penalty
    )
    before, after = case.network, project_bounds(problem, case.network)
    assert problem.excess(after) <= 1e-12
    assert all(torch.equal(a, b) for a, b in zip((*after.masses, after.readout), (*before.masses, before.readout)))
    if factor > 1:
        torch.testing.assert_close(after.tensors(), before.tensors(), rtol=1e-15, atol=0)
    for i, z in enumerate(before.kernels[0]):
        length = math.sqrt(slow.input_cost(before, i))
        scale = min(1.0, penalty.input_bound / length)
        torch.testing.assert_close(after.kernels[0][i], scale * z, rtol=1e-12, atol=0)
        if before.biases[0] is not None:
            torch.testing.assert_close(after.biases[0][i], scale * before.biases[0][i], rtol=1e-12, atol=0)
    for layer in range(1, len(before.widths)):
        masses = slow.array(before.masses[layer - 1])
        for j, rows in enumerate(slow.array(before.kernels[layer])):
            expected = nearest(rows, masses, penalty.amplitude_bound, penalty)
            np.testing.assert_allclose(slow.array(after.kernels[layer][j]), expected, atol=1e-9)
        if before.biases[layer] is not None:
            bound = penalty.amplitude_bound
            torch.testing.assert_close(after.biases[layer], before.biases[layer].clamp(-bound, bound))


TANH, RELU = mf.Conv(2, activation="tanh"), mf.Conv(2)
BIASED = replace(TANH, bias=True)


@pytest.mark.parametrize(
    ("layers", "penalty", "expected"),
    [
        ((RELU,), {}, []),
        ((BIASED,), {}, []),
        ((RELU, RELU), {}, ["input_bound", "amplitude_bound"]),
        ((TANH, RELU), {"amplitude_bound": 1.0}, ["input_bound"]),
        ((RELU, TANH), {"input_bound": 1.0}, ["amplitude_bound"]),
        ((RELU, RELU), {"input_bound": 1.0, "amplitude_bound": 1.0}, []),
        ((TANH, TANH), {}, []),
        ((TANH, BIASED), {}, ["amplitude_bound"]),
        ((BIASED, TANH), {}, []),
        ((TANH,), {"input": 0}, ["input_bound"]),
        ((TANH, TANH), {"source": 0}, ["amplitude_bound"]),
        ((TANH,), {"source": 0}, []),
        ((TANH,), {"readout": 0}, ["a positive readout penalty"]),
        ((TANH,), {"input": 0, "input_bound": 1.0}, []),
        ((RELU,), {"power": 1.9}, ["input_bound"]),
        ((RELU,), {"power": 1.9, "input_bound": 1.0}, []),
        ((RELU,), {"power": 3.0}, []),
        ((TANH,), {"power": 1.5}, []),
    ],
)
def test_missing_bounds_follow_the_theory(layers, penalty, expected):
    problem = mf.Problem(
        mf.Architecture((1, 3, 3), layers), torch.zeros(2, 1, 3, 3), [1, 2], penalty=mf.Penalty(**penalty)
    )
    assert problem.missing_bounds() == expected


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architecture": "cnn"}, TypeError, "architecture must be an Architecture, not str"),
        ({"penalty": 0.1}, TypeError, "penalty must be a Penalty, not float"),
        ({"loss": "zero_one"}, ValueError, "loss='zero_one' is unknown"),
        ({"inputs": "images"}, TypeError, "inputs of type str is not a tensor or an array of numbers"),
        ({"targets": [None, 1]}, TypeError, "targets of type list"),
        ({"inputs": torch.zeros(2, 3, 3)}, ValueError, r"inputs has shape \(2, 3, 3\)"),
        ({"inputs": torch.zeros(0, 1, 3, 3)}, ValueError, "inputs is empty"),
        ({"inputs": torch.zeros(2, 1, 3, 3, dtype=torch.float16)}, ValueError, "inputs has dtype torch.float16"),
        ({"inputs": torch.zeros(2, 1, 3, 3, dtype=torch.complex64)}, ValueError, "inputs has dtype torch.complex64"),
        ({"inputs": torch.full((2, 1, 3, 3), torch.nan)}, ValueError, r"inputs\[0, 0, 0, 0\] is nan"),
        ({"targets": [1.0]}, ValueError, r"targets has shape \(1,\)"),
    ],
)
def test_problem_names_the_bad_argument(changes, error, message):
    arguments = {"architecture": ARCH, "inputs": torch.zeros(2, 1, 3, 3), "targets": [0.0, 1.0], **changes}
    with pytest.raises(error, match=message):
        mf.Problem(**arguments)


def test_networks_of_another_architecture_or_dtype_are_refused():
    problem = mf.Problem(ARCH, torch.zeros(2, 1, 3, 3, dtype=torch.float64), [0.0, 1.0])
    other = mf.Architecture((1, 3, 3), mf.Conv(2))
    with pytest.raises(ValueError, match="the network has the architecture"):
        problem.value(random_network(other, (3,), 0))
    with pytest.raises(ValueError, match=r"the network is torch.float32 on cpu, the problem torch.float64 on cpu"):
        problem.value(random_network(ARCH, (3, 2), 0, dtype=torch.float32))


@pytest.mark.parametrize(
    "given",
    [
        lambda x: x.numpy().astype(">f8"),
        lambda x: np.flip(np.flip(x.numpy(), 2).copy(), 2),
        lambda x: list(x),
        lambda x: np.asfortranarray(x.numpy()),
    ],
    ids=["big-endian", "negative strides", "list of tensors", "columns first"],
)
def test_arrays_of_any_layout_are_read_as_they_are(given):
    arch = mf.Architecture((1, 2, 3), mf.Conv(1))
    inputs = torch.arange(12.0, dtype=torch.float64).reshape(2, 1, 2, 3)
    assert torch.equal(mf.Problem(arch, given(inputs), [1.0, 2.0]).inputs, inputs)


def test_complex_targets_are_refused():
    arch = mf.Architecture((1, 2, 3), mf.Conv(1))
    with pytest.raises(ValueError, match=r"targets has dtype torch\.complex64; targets are real"):
        mf.Problem(arch, torch.ones(2, 1, 2, 3), torch.ones(2) + 1j)


def test_only_dtypes_in_which_the_library_computes():
    arch = mf.Architecture((1, 2, 3), mf.Conv(1))
    problem = mf.Problem(arch, torch.ones(2, 1, 2, 3), [1.0, 2.0])
    network = mf.starts.draw(problem, (2,), torch.Generator())
    for thing in (problem, network, mf.ConvexProgram.freeze(problem, network)):
        with pytest.raises(ValueError, match=r"dtype=torch\.float16 must be torch\.float32 or torch\.float64"):
            thing.to(dtype=torch.float16)


@pytest.mark.parametrize("solver", ["flow", "freeze"])
def test_networks_from_which_no_solver_can_begin_are_refused(solver):
    """NaN, and finite entries with an infinite J: solvers ran to their limits and returned J = inf."""
    arch = mf.Architecture((1, 2, 3), mf.Conv(1))
    problem = mf.Problem(arch, torch.ones(2, 1, 2, 3, dtype=torch.float64), [1.0, 2.0])
    network = mf.starts.draw(problem, (2,), torch.Generator())
    begin = {"flow": lambda start: mf.solvers.flow.solve(problem, start, steps=1), "freeze": None}[solver]
    begin = begin or (lambda start: mf.ConvexProgram.freeze(problem, start))
    with pytest.raises(ValueError, match=r"kernels\[0\]\[0, 0, 0, 0\] is nan"):
        begin(network.map(lambda tensor: tensor * (math.nan if tensor.ndim == 4 else 1)))
    with pytest.raises(ValueError, match=r"network has J = (inf|nan) in torch\.float64, where no solver can begin"):
        begin(network.map(lambda tensor: tensor * (1e200 if tensor.ndim > 1 else 1)))
