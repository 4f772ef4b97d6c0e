"""Everything that computes, carried through on a device that is not there: no tensor of the host meets one of the
device, and the inner loops wait for no number, or for one a step.
"""

import math
from contextlib import contextmanager

import pytest
import torch
from pretend_device import PretendDevice
from strategies import bounded, normal, random_inputs, random_network, random_targets, seeded
from torch_networks import IMAGES, deep, normed_blocks, plain, residual

import meanfield as mf
from meanfield import certificates, finite, fusion, grafting, landscape, measures, penalties
from meanfield.bench import distances
from meanfield.certificates import search
from meanfield.convex.program import ConvexProgram
from meanfield.finite import kernel
from meanfield.grafting import graft
from meanfield.solvers import alternating, arrangements, flow, reference, splitting, velocities
from meanfield.solvers.acceleration import Anderson
from meanfield.studies import convexity
from meanfield.subject import Subject

WIDTHS = (4, 3, 2)


def made(loss="squared", depth=2, *, outputs=2, count=4, norm="l2", bound=None, dtype=torch.float64, **layer):
    """A problem and a network that meets its bounds, both on the host."""
    first = mf.Conv(2, **{"padding": 1, "activation": "tanh", "pooling": "average", **layer})
    later = mf.Conv(2, **{"padding": 1, "activation": "tanh", **layer})
    arch = mf.Architecture((1, 4, 4), (first, *[later] * (depth - 1)), outputs=outputs)
    network = random_network(arch, WIDTHS[:depth], 0, dtype)
    penalty = bounded(mf.Penalty(source=0.02, readout=0.03, input=0.01, kernel_norm=norm), network, bound, bound)
    inputs, targets = random_inputs(arch, count, 0, dtype), random_targets(loss, outputs, count, 0)
    return mf.Problem(arch, inputs, targets, loss, penalty), network


def on_device(*things):
    moved = [each.to(device="cuda") for each in things]
    return moved if len(moved) > 1 else moved[0]


def is_there(*tensors):
    return all(tensor.is_cuda for tensor in tensors)


@pytest.fixture
def pretend():
    with PretendDevice() as device:
        yield device


class TestThePretendDevice:
    def test_it_refuses_what_cuda_refuses(self, pretend):
        there, here = torch.zeros(3, device="cuda"), torch.zeros(3)
        assert there.is_cuda
        assert str(there[1:].detach().device) == "cuda:0"
        for wrong in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: here[there.long()],
            lambda: there.numpy(),
            lambda: torch.rand(3, generator=torch.Generator(), device="cuda"),
            lambda: there.long()[None] @ there.long()[:, None],
        ):
            with pytest.raises((RuntimeError, TypeError), match="pretend device"):
                wrong()
        assert (there + torch.tensor(1.0)).sum().cpu() == 3  # numbers of the host are welcome

    def test_a_wrong_device_in_a_backward_pass_is_seen(self, pretend):
        other = torch.ones(3)

        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 2 * x

            @staticmethod
            def backward(ctx, grad):
                return grad * other

        leaf = torch.zeros(3, device="cuda", requires_grad=True)
        with pytest.raises(RuntimeError, match="pretend device: mul"):
            Wrong.apply(leaf).sum().backward()

    def test_it_counts_reads_and_nothing_else(self, pretend):
        there = torch.arange(4.0, device="cuda")
        (there * 2 + 1).sum().sqrt().clamp_min(0)
        assert pretend.reads == 0
        reads = [float, bool, torch.Tensor.tolist, torch.Tensor.cpu, torch.nonzero, lambda t: there[t > 0]]
        for count, read in enumerate(reads, start=1):
            read(there.sum())
            assert pretend.reads == count, read

    def test_products_are_rounded_where_the_settings_say_so(self):
        x = normal((1, 1, 4, 4), 0, torch.float32)
        exact = torch.nn.functional.conv2d(x, x)
        with PretendDevice(tf32=True):
            there = on_device(x)
            rounded, half = torch.nn.functional.conv2d(there, there).cpu(), (there[0, 0] @ there[0, 0]).cpu()
        assert 1e-5 < float((rounded - exact).abs() / exact.abs()) < 1e-3
        assert torch.equal(half, x[0, 0] @ x[0, 0])  # torch leaves matrix products alone


def solved_by_splitting(**case):
    problem, network = on_device(*made(**case))
    solution = splitting.solve(ConvexProgram.freeze(problem, network), max_iterations=11)
    assert is_there(*solution.network.tensors(), *solution.point.tensors(), solution.multipliers.output)
    return solution


def test_splitting(pretend):
    solved_by_splitting(loss="softmax")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"loss": "squared"},
        {"loss": "squared", "bound": 1.2, "bias": True},
        {"loss": "logistic", "norm": "l1", "depth": 3},
    ],
    ids=["plain", "bounds_and_biases", "three_layers_l1"],
)
def test_splitting_of_more(pretend, case):
    solved_by_splitting(**case)


def flowed(steps=2, case=None, **options):
    problem, network = on_device(*made(**(case or {})))
    solution = flow.solve(problem, network, steps=steps, record_every=1000, **options)
    assert is_there(*solution.network.tensors())
    return solution


def test_flow(pretend):
    flowed()


@pytest.mark.slow
@pytest.mark.parametrize("descent", flow.DESCENTS)
@pytest.mark.parametrize("masses", [True, False])
@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("case", [{}, {"norm": "l1", "bound": 1.05, "bias": True}], ids=["free", "bounded"])
def test_flows(pretend, descent, masses, batch_size, case):
    flowed(descent=descent, masses=masses, batch_size=batch_size, case=case)


@pytest.fixture
def short_searches(monkeypatch):
    monkeypatch.setattr(search, "STEPS", {True: 3, False: 3})
    monkeypatch.setattr(alternating, "STARTS", 4)
    monkeypatch.setattr(alternating, "CONFIRMING_STARTS", 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "case"),
    [
        ("low_rank", {"loss": "softmax", "bias": True, "activation": "tanh"}),
        ("anchored", {"depth": 1, "activation": "relu", "outputs": 1}),
    ],
    ids=["deep", "relu"],
)
@pytest.mark.filterwarnings("ignore:the infimum over all measures")
def test_the_main_job(pretend, short_searches, start, case):
    problem = on_device(made(**case)[0])
    options = {"rounds": 2, "flow_steps": 4, "program_iterations": 11, "grow": 1}
    widths = WIDTHS[: problem.architecture.depth]
    solution = mf.solve(problem, widths, start=start, clones=(1,) * len(widths), **options)
    assert is_there(*solution.network.tensors(), *solution.point.tensors())


@pytest.mark.parametrize(
    "solver",
    [pytest.param(reference.solve, marks=pytest.mark.slow, id="cvxpy"), pytest.param(arrangements.solve, id="cells")],
)
def test_multipliers_of_solvers_of_the_host_lead_a_search_on_the_device(pretend, solver):
    if solver is reference.solve:
        problem, network = on_device(*made(bias=True, bound=1.2))
        found = solver(ConvexProgram.freeze(problem, network))
    else:
        arch = mf.Architecture((1, 2, 2), (mf.Conv((1, 2)),))
        images, targets = random_inputs(arch, 3, 0), random_targets("squared", 1, 3, 0)
        problem = on_device(mf.Problem(arch, images, targets, penalty=mf.Penalty(input=0.01, readout=0.01)))
        found = solver(problem)
    assert is_there(*found.network.tensors(), found.multipliers.output, *found.multipliers.realisation)
    unseen = certificates.search_features(problem, found.multipliers.output, found.network, starts=4, steps=3, rounds=1)
    on_the_host = certificates.search_features(
        problem, found.multipliers.output.cpu(), found.network, starts=4, steps=3, rounds=1
    )
    assert on_the_host.bound == unseen.bound


def test_measures_take_shares_and_indices_of_the_host(pretend):
    problem, network = on_device(*made(bias=True))
    shares = torch.tensor([0.25, 0.75], dtype=torch.float64)
    for given in (shares, shares.float(), on_device(shares)):
        cloned = measures.split(network, 0, 1, given)
        assert float(problem.value(cloned) - problem.value(network)) == pytest.approx(0, abs=1e-12)
    keep = [torch.tensor([0, 1])] * 2
    grown = measures.extend(network, (2, 2), 0.1, seeded())
    found = [grown, measures.merge(network, 0, [0, 1]), measures.mixture(network, network, 0.3)]
    found += [measures.select(network, keep), measures.drop_massless(grown), measures.adjoin(network, network)]
    found += [measures.interpolate(network, network, 0.5), measures.permute(network, [torch.arange(m) for m in (4, 3)])]
    single = on_device(made(depth=1, activation="relu")[1])
    found += [measures.balance(single, 0.1, 0.2)]
    assert all(is_there(*each.tensors()) for each in found)


@pytest.mark.parametrize("join", [lambda a, b: measures.mixture(a, b, 0.5), measures.adjoin])
def test_networks_of_two_devices_are_refused(pretend, join):
    network = made()[1]
    with pytest.raises(ValueError, match=r"float64 on cpu and torch\.float64 on cuda:0; convert one with \.to"):
        join(network, on_device(network))


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_finite_training(pretend, optimiser):
    noise = 0.1 if optimiser == "sgd" else 0.0
    trained = finite.train(
        on_device(made()[0]), (4, 3), steps=3, optimiser=optimiser, batch_size=2, noise=noise, record_every=2
    )
    assert is_there(*trained.network.parameters())


def test_fitting(pretend):
    network = finite.vgg(8, (1, 4, 4), 3, width=2, hidden=(6,), dropout=0.1, generator=seeded(), dtype=torch.float32)
    images, labels = torch.rand(12, 1, 4, 4, generator=seeded(3)).to("cuda"), on_device(torch.arange(12) % 3)
    recipe = finite.Recipe(epochs=2, batch_size=8, learning_rate=0.02, augment=True)
    fitted = finite.fit(network, images, labels, recipe)
    assert is_there(*fitted.network.parameters())
    finite.evaluate(fitted.network, images, labels)


def test_finite_networks_and_their_kernels(pretend):
    problem, network = on_device(*made(outputs=1, depth=1, activation="relu"))
    drawn = finite.sample(network, (3,), seeded())
    assert is_there(*finite.sequential(network).parameters(), *drawn.parameters())
    assert is_there(kernel.empirical(drawn, problem.inputs), kernel.infinite(problem.architecture, problem.inputs))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("method", grafting.METHODS)
def test_grafting(pretend, method):
    lower, upper, images = on_device(plain(6, 0), plain(6, 1), IMAGES[:40])
    found = graft(lower, upper, "3", images, method=method, steps=3)
    assert is_there(*found.network.parameters(), found.network(images))


def test_joins(pretend):
    images, labels = normal((8, 1, 8, 8), 0).cuda(), torch.arange(8).cuda() % 3
    for make, ways in ((normed_blocks, ("weights", "matched")), (deep, ("displacement", "mixture"))):
        a, b = (make(2, seed).to("cuda") for seed in (0, 1))
        for how in ways:
            joined = landscape.join(a, b, images, labels, how, times=3)
            assert is_there(*joined.at(0.5).state_dict().values())


def test_fusion(pretend):
    a, b = (normed_blocks(2, seed).to("cuda") for seed in (0, 1))
    images = normal((8, 1, 8, 8), 0).cuda()
    for method in fusion.METHODS:
        assert is_there(*fusion.fuse(a, b, images, method).state_dict().values())
    assert is_there(*fusion.fuse(a, b, images, "weights", repair=True).state_dict().values())
    union = fusion.fuse(a, b, images)
    for by in ("elimination", "random"):
        assert is_there(fusion.reduce(union, a, images, by)(images))


def test_grafting_of_residual_networks(pretend):
    lower, upper, images = on_device(residual(4, 0), residual(6, 1), normal((20, 2, 12, 12), 9))
    assert is_there(graft(lower, upper, "stage1.1", images).network(images))


def test_sharpness(pretend):
    """A few numbers a measure beside the copy of the network: one a look of Lanczos, none a product."""
    network, images, targets = on_device(residual(2, 0), IMAGES[:9], torch.arange(9) % 3)
    Subject(network)
    copying = pretend.reads
    for measure, most in (("top", 8), ("trace", 6), ("adaptive", 4)):
        before = pretend.reads
        landscape.sharpness(network, images, targets, measures=measure, steps=10, products=10)
        assert pretend.reads - before - copying <= most, measure


def test_distances(pretend):
    problem, network = on_device(*made())
    other = on_device(random_network(problem.architecture, (6, 3), 5))
    a, b = (distances.FeatureMeasure.of(each, problem.inputs, 0) for each in (network, other))
    sliced = distances.sliced_wasserstein(a, b, generator=seeded())
    found = [distances.wasserstein(a, b), sliced.value, *distances.mmd(a, b).values]
    found += [distances.median_distance(a, b), distances.linear_cka(a, b), distances.debiased_cka(a, b)]
    assert all(map(math.isfinite, found))
    distances.split_half(b, distances.wasserstein, seeded(), repetitions=2)
    distances.moments(a.standardised())


@pytest.mark.slow
def test_convexity(pretend):
    problem, network = on_device(*made(count=2))
    variables = convexity.ProgramVariables(ConvexProgram.freeze(problem, network))
    points = torch.stack([variables.sample(seeded(seed)) for seed in range(2)])
    assert convexity.segments(variables.objective, points, times=1).convex
    assert not convexity.curvature(variables.objective, points[0], variables.tangent(points[0])).negative
    assert not convexity.falsify(variables.objective, variables.sample, 3).falsified


# ---- host reads


@pytest.fixture
def reads_per_step(pretend, monkeypatch):
    """Of a flow: the difference between runs of two lengths.  Their certificates, which take as many trials as they
    need, are left out.
    """
    monkeypatch.setattr(flow._Trail, "solution", lambda trail, status: trail)

    def measured(case, **options):
        problem, network = on_device(*made(**case))
        found = []
        for steps in (2, 6):
            before = pretend.reads
            flow.solve(problem, network, steps=steps, record_every=1000, **options)
            found.append(pretend.reads - before)
        return (found[1] - found[0]) / 4

    return measured


BOUNDED = {"loss": "logistic", "bound": 1.2, "bias": True, "norm": "l1"}


@pytest.mark.parametrize("case", [{}, {"loss": "softmax"}, pytest.param(BOUNDED, marks=pytest.mark.slow)])
def test_an_iteration_of_splitting_reads_nothing(pretend, case):
    problem, network = on_device(*made(**case))
    inner = splitting._Run(ConvexProgram.freeze(problem, network), 1.0, 1e-6, None).splitting
    before, operations, accelerated = pretend.reads, pretend.operations, Anderson()
    for _ in range(10):
        inner.state = accelerated.advance(inner.state, inner.change(), inner.metric)
    assert pretend.reads == before, pretend.places("read")
    if not case:
        assert pretend.operations - operations < 10 * 400  # two roots of 25 Newton steps alone took 2,550 an iteration


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize(("descent", "reads"), [("preconditioned", 0), ("gradient", 1)])
def test_a_step_of_the_flow_reads_at_most_once(reads_per_step, descent, reads, batch_size):
    assert reads_per_step({}, descent=descent, batch_size=batch_size) == reads


@pytest.mark.parametrize(("masses", "reads"), [(True, 1), (False, 0)])
def test_a_step_inside_an_amplitude_bound_reads_once_where_masses_move(reads_per_step, masses, reads):
    assert reads_per_step({"bound": 1.05, "bias": True}, masses=masses) == reads


@pytest.mark.slow
def test_a_certificate_reads_each_trial_once(pretend):
    """The search for kappa on three layers tried 8,800 numbers, each of which the host waited for."""
    problem, network = on_device(*made(depth=3, bound=1.2))
    program = ConvexProgram.freeze(problem, network)
    point = program.point(network)
    before = pretend.reads
    found = certificates.certify(program, point)
    assert pretend.reads - before < 40, pretend.places("read")
    there, here = problem.to(device="cpu"), network.to(device="cpu")
    same = certificates.certify(ConvexProgram.freeze(there, here), ConvexProgram.freeze(there, here).point(here))
    assert found.dual_value == pytest.approx(same.dual_value, rel=1e-12)


# ---- numbers


def test_extreme_cold_roots_are_right():
    """Of 200 such rows a fixed number of Newton steps left 35 off by more than 1e-3."""
    draw = lambda *shape: 10 ** (16 * torch.rand(shape, generator=seeded(1), dtype=torch.float64) - 8)  # noqa: E731
    atoms, masses = draw(5, 200, 2), draw(200) * normal((200,), 2).sign()
    for slope, curvature in ((1.0, 1.0), (1e-6, 1e3), (1e4, 1e-8)):
        with PretendDevice():
            there = on_device(atoms), on_device(masses)[None, :, None]
            roots = penalties.shrinkage_root(there[0], slope, 1.0, (0, 2), mass=there[1], curvature=curvature).cpu()
        below, above = (_excess(atoms, masses, slope, curvature, (1 + change) * roots) for change in (-1e-12, 1e-12))
        assert ((below <= 0) & (above >= 0)).all()  # the root itself is within 1e-12


def _excess(atoms, masses, slope, curvature, roots):
    """Right side minus left side of the equation of `shrinkage_root`, per row."""
    left = (atoms - slope * roots).clamp_min(0).sum((0, 2))
    return roots.flatten() * (masses + curvature * roots.flatten().square()).clamp_min(0) - left


@contextmanager
def settings(products="none"):
    """The process's own, with that of matrix products given; what runs inside must leave them."""
    owners = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before, owners[1].fp32_precision = owners[1].fp32_precision, products
    now = lambda: [owner.fp32_precision for owner in owners]  # noqa: E731
    try:
        given = now()
        yield now
        assert now() == given
    finally:
        owners[1].fp32_precision = before


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="settings of torch >= 2.9")
class TestFullPrecision:
    def test_a_frozen_point_is_violated_by_rounding_only(self):
        problem, network = made(dtype=torch.float32, depth=3)
        with PretendDevice(tf32=True), settings():
            problem, network = on_device(problem, network)
            program = ConvexProgram.freeze(problem, network)
            assert program.violation(program.point(network)) < 5e-7
            exact = network.to(dtype=torch.float64)(problem.inputs.double())
            assert float((network(problem.inputs) - exact).abs().max() / exact.abs().max()) < 1e-6

    @pytest.mark.parametrize("asked", ["ieee", "tf32"])
    def test_gradients_of_the_flow_are_not_rounded(self, asked):
        problem, network = made(dtype=torch.float32)
        _, exact = velocities.velocity(problem.to(dtype=torch.float64), network.to(dtype=torch.float64))
        with PretendDevice(tf32=True), settings(asked):
            _, found = velocities.velocity(*on_device(problem, network))
            found = [each.cpu().double() for each in (*found.kernels, found.readout)]
        for each, right in zip(found, (*exact.kernels, exact.readout)):
            assert float((each - right).abs().max() / right.abs().max()) < 2e-6

    def test_the_settings_are_put_back_after_an_error(self, pretend):
        def stop(row):
            raise ArithmeticError

        seen = []
        with settings() as now:
            problem, network = on_device(*made())
            with pytest.raises(ArithmeticError):
                flow.solve(problem, network, steps=2, callback=lambda row: seen.append(now()) or stop(row))
        assert seen == [["ieee", "ieee"]]
