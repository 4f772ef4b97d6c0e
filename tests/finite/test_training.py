"""Training of finite networks: the steps are those of the particle flow, the bounds hold, every ending has a status."""

import copy
import math

import pytest
import torch
from stored_optima import EXACT_ONE_LAYER, one_layer_problem
from strategies import seeded

import meanfield as mf
from meanfield import data, starts
from meanfield.finite import FiniteCNN, train
from meanfield.finite import training as module
from meanfield.finite.scaling import BASE_WIDTH, Scaling
from meanfield.finite.scaling import SCALINGS as NAMED
from meanfield.penalties import input_norms
from meanfield.solvers import velocities

SCALINGS = ("mean_field", "ntk", "standard", "mup")


def make_problem(*, bias=True, loss="squared", count=7, dtype=torch.float64, **penalty):
    layers = (mf.Conv(3, padding=1, activation="tanh", bias=bias), mf.Conv(2, stride=2, activation="relu", bias=bias))
    outputs = 3 if loss == "softmax" else 1
    arch = mf.Architecture((2, 4, 4), layers, outputs=outputs)
    inputs = torch.rand((count, 2, 4, 4), generator=seeded(5), dtype=torch.float64).to(dtype)
    targets = torch.arange(count) % 3 if loss == "softmax" else torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0)
    return mf.Problem(
        arch,
        inputs,
        targets,
        loss=loss,
        penalty=mf.Penalty(**{"source": 1e-3, "readout": 2e-3, "input": 3e-3, **penalty}),
    )


# the first layer's biases at another rate than its kernels, and gradients of another size
UNEVEN = Scaling(
    forward={"input": 0.5}, learning_rate={"bias": 2, "readout": 0.5}, gradient={"bias": -1, "hidden": 0.3}
)


def random_network(problem, widths, scaling="mean_field", seed=0):
    """Every parameter, biases too, of order one in the mean-field scaling."""
    generator, arch = seeded(seed), problem.architecture
    normal = lambda shape: torch.randn(tuple(shape), generator=generator, dtype=problem.inputs.dtype)  # noqa: E731
    biases = [normal((m,)) if layer.bias else None for layer, m in zip(arch.layers, widths)]
    kernels = [normal(shape) for shape in arch.kernel_shapes(widths)]
    plain = FiniteCNN(arch, kernels, normal(arch.readout_shape(widths[-1])), biases)
    return FiniteCNN.from_particles(plain.particles(), scaling)


def digits(widths=None, **settings):
    found = data.load("digits", classes=(3, 5), samples=12, pool=2)
    conv = mf.Conv(3, padding=1, activation="tanh")
    problem = mf.Problem(
        mf.Architecture(found.input_shape, (conv, conv)), found.inputs, found.targets("squared"), penalty=mf.Penalty()
    )
    return problem if widths is None else train(problem, widths, **settings)


def make_run(problem, network, *, optimiser="sgd", rate=1e-3, noise=0.0, batch_size=None, shuffle=False, seed=0):
    """A run at a constant learning rate that moves `network` itself."""
    settings = module._Settings(optimiser, network.scaling, rate, 1000, "constant", noise)
    return module._Run(
        problem, network, settings, module._Batches(len(problem.inputs), batch_size, shuffle, seeded(seed))
    )


def comparable(history):
    """The records without the seconds."""
    return [{name: figure for name, figure in record.items() if name != "seconds"} for record in history]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def repeated(network, counts=(2, 2)):
    """Every channel of layer l counts[l] times: the same measures, wider."""
    particles = network.particles()
    copies = [torch.arange(count * m) // count for count, m in zip(counts, network.widths, strict=True)]
    chosen = mf.measures.select(particles, copies)
    masses = [p / count for count, p in zip(counts, chosen.masses)]
    return FiniteCNN.from_particles(
        mf.ParticleNetwork(network.architecture, masses, chosen.kernels, chosen.readout, chosen.biases), network.scaling
    )


class TestSteps:
    @pytest.mark.parametrize("indices", [None, [0, 1, 2]])
    def test_an_sgd_step_is_an_euler_step_of_the_particle_flow(self, indices):
        """dz = -(1/p) dJ/dz, dw = -(1/(p p')) dJ/dw, du = -(1/p) dJ/du, with J's gradient taken on particles."""
        problem, rate = make_problem(), 1e-3
        start = random_network(problem, (3, 4))
        # one step of two batches at most: the first batch is the first three images in file order
        batch = {} if indices is None else {"batch_size": 3, "shuffle": False}
        moved = copy.deepcopy(start)
        module._step(make_run(problem, moved, rate=rate, **batch))
        particles = start.particles().map(lambda tensor: tensor.requires_grad_())
        part = problem if indices is None else problem.batch(torch.tensor(indices))
        part.terms(particles).total().backward()
        p1, p2 = 1 / 3, 1 / 4
        pairs = [
            (moved.kernels[0], particles.kernels[0], p1),
            (moved.kernels[1], particles.kernels[1], p1 * p2),
            (moved.readout, particles.readout, p2),
            (moved.biases[0], particles.biases[0], p1),
            (moved.biases[1], particles.biases[1], p2),
        ]
        for after, before, mass in pairs:
            assert before.grad.any()
            torch.testing.assert_close(
                after.detach(), (before - rate * before.grad / mass).detach(), rtol=1e-12, atol=1e-14
            )

    @pytest.mark.parametrize("scaling", ["ntk", "standard"])
    def test_other_scalings_follow_their_plain_gradient(self, scaling):
        problem, rate = make_problem(), 1e-3
        start = random_network(problem, (3, 4), scaling)
        loss = problem.loss.value(start(problem.inputs), problem.targets).mean()
        penalties = problem.terms(start.particles(attached=True))
        (loss + penalties.source + penalties.readout + penalties.input).backward()
        moved = copy.deepcopy(start)
        module._step(make_run(problem, moved, rate=rate))
        for after, before in zip(moved.parameters(), start.parameters(), strict=True):
            torch.testing.assert_close(after.detach(), (before - rate * before.grad).detach(), rtol=1e-12, atol=1e-14)

    def on_the_bounds(self, **penalty):
        """A problem with bounds and a network on all of them, large targets so that it presses outward."""
        free = make_problem(**penalty)
        start = random_network(free, (3, 4), seed=2)
        particles = start.particles()
        inner = float(input_norms(particles.kernels[0], particles.biases[0]).min()) / 2
        reached = particles.amplitudes(1, free.penalty.norms(particles.kernels[1]))
        # every kernel sum is cut, and biases beyond the bound are
        bounds = {"amplitude_bound": 0.7 * float(reached.min()), "input_bound": inner}
        problem = make_problem(**penalty, **bounds)
        problem.targets = 10 * problem.targets
        module._project(start, problem)
        return problem, start

    def check_held(self, problem, start, end):
        """Some features stay on every bound, those of the input, of kernel sums and of biases."""
        penalty = problem.penalty
        for network in (start, end):
            inner = input_norms(network.kernels[0], network.biases[0]) / penalty.input_bound
            sums = network.amplitudes(1, penalty.norms(network.kernels[1])) / penalty.amplitude_bound
            for reached in (inner, sums, network.biases[1].abs() / penalty.amplitude_bound):
                assert bool((reached >= 1 - 1e-12).any())

    def test_an_sgd_step_on_the_bounds_is_the_flows(self):
        """No source penalty: the flow takes its proximal map, training its gradient."""
        problem, start = self.on_the_bounds(source=0.0)
        particles, moved = start.particles(), copy.deepcopy(start)
        _, moving = velocities.velocity(problem, particles, masses=False)
        expected = velocities.advance(problem, particles, moving.map(lambda v: 1e-3 * v), 1e-3)
        module._step(make_run(problem, moved, rate=1e-3))
        torch.testing.assert_close(moved.particles().tensors(), expected.tensors(), rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("scaling", ["ntk", "standard", "mup", UNEVEN])
    def test_sgd_of_parameters_on_the_bounds_dissipates_its_squared_speed(self, scaling):
        """J falls by the squared length of a step in the parameters' own metric over its rate."""
        problem, start = self.on_the_bounds()
        start, lengths, errors = FiniteCNN.from_particles(start.particles(), scaling), [], []
        factors = module._step_lengths(start)
        before = float(problem.terms(start.particles()).total().detach())
        for rate in (1e-4, 1e-5):
            moved = copy.deepcopy(start)
            module._step(make_run(problem, moved, rate=rate))
            self.check_held(problem, start.particles(), moved.particles())
            pairs = zip(moved.named_parameters(), start.parameters(), strict=True)
            lengths.append(sum(float((a - b).detach().square().sum()) / factors[name] for (name, a), b in pairs))
            errors.append(1 + (float(problem.terms(moved.particles()).total().detach()) - before) * rate / lengths[-1])
        # an error of first order, so a tenth; what is left is of second order
        assert abs(errors[1] - errors[0] / 10) <= 0.02 * abs(errors[0])

    def test_sgd_on_the_bounds_dissipates_its_squared_speed(self):
        problem, start = self.on_the_bounds()
        particles, errors = start.particles(), []
        for rate in (1e-3, 1e-4):
            moved = copy.deepcopy(start)
            module._step(make_run(problem, moved, rate=rate))
            end = moved.particles()
            assert problem.excess(end) <= 1e-14
            self.check_held(problem, particles, end)
            change = float((problem.terms(end).total() - problem.terms(particles).total()).detach())
            errors.append(1 + change * rate / float(velocities.squared_distance(particles, end).detach()))
        # an error of first order, so a tenth; what is left is of second order
        assert abs(errors[1] - errors[0] / 10) <= 0.02 * abs(errors[0])

    @pytest.mark.parametrize("optimiser", ["sgd", "adam"])
    @pytest.mark.parametrize("scaling", SCALINGS)
    def test_doubling_every_channel_changes_the_course_only_without_the_metric(self, optimiser, scaling):
        """In the mean-field scaling the values of a run depend on the measures, not on the number of channels."""
        problem = make_problem()
        start = random_network(problem, (3, 4), scaling)
        rate = (0.02 if optimiser == "adam" else 0.1) * (0.2 if scaling == "mup" else 1)
        differ = self.relative_difference(
            start, repeated(start), problem, scaling=scaling, optimiser=optimiser, learning_rate=rate
        )
        # Adam's epsilon, 1e-8 against gradients of a size that falls with the width, is all that differs in mup
        assert (
            differ < {"mean_field": 1e-8, "mup": 1e-5}[scaling] if scaling in ("mean_field", "mup") else differ > 0.02
        )

    @pytest.mark.parametrize("optimiser", ["sgd", "adam"])
    @pytest.mark.parametrize("counts", [(2, 1), (1, 3)])
    def test_mup_rates_follow_the_width_of_each_layer(self, optimiser, counts):
        problem = make_problem()
        start = random_network(problem, (3, 4), "mup")
        rate = 0.004 if optimiser == "adam" else 0.02
        assert (
            self.relative_difference(
                start, repeated(start, counts), problem, scaling="mup", optimiser=optimiser, learning_rate=rate
            )
            < 1e-5
        )

    def relative_difference(self, start, wider, problem, **settings):
        """Largest difference of J along two runs of 40 steps, relative to its decrease."""
        runs = [train(problem, network.widths, start=network, steps=40, **settings) for network in (start, wider)]
        narrow, wide = (torch.tensor([record["value"] for record in run.history], dtype=torch.float64) for run in runs)
        drop = float(narrow[0] - narrow[-1])
        assert drop > 1e-3
        return float((narrow - wide).abs().max()) / drop


def one_step_changes(scaling, optimiser, width, seeds):
    """Root mean square change of the features of both layers and of the output by the first step, geometric mean over
    seeds, (3,).
    """
    layers = (mf.Conv(3, padding=1, activation="relu", bias=True), mf.Conv(2, activation="relu", bias=True))
    arch = mf.Architecture((1, 4, 4), layers)
    inputs = torch.rand((4, 1, 4, 4), generator=seeded(5), dtype=torch.float64)
    # targets large against the output of the start, so that the residual is the same at every width and seed
    problem = mf.Problem(
        arch, inputs, torch.tensor([10.0, -10.0, 10.0, 10.0]), penalty=mf.Penalty(source=0, readout=0, input=0)
    )
    changes = []
    for seed in seeds:
        network = FiniteCNN.random(arch, (width, width), inputs, seeded(seed), scaling)
        before = [*network.particles().features(inputs), network(inputs).detach()]
        module._step(make_run(problem, network, optimiser=optimiser, rate=0.002 if optimiser == "sgd" else 5e-4))
        after = [*network.particles().features(inputs), network(inputs).detach()]
        changes.append([float((b - a).square().mean().sqrt().log()) for a, b in zip(before, after, strict=True)])
    return torch.tensor(changes).mean(0).exp()


class TestMaximalUpdate:
    @pytest.mark.slow
    @pytest.mark.parametrize("optimiser", ["sgd", "adam"])
    def test_first_step_changes_features_and_output_by_order_one_at_every_width(self, optimiser):
        """Slope of the log of the change against the log of the width; least squares on widths 64, 256, 1024 is that
        of the outer two.

        Control, "standard": SGD changes (features 1, features 2, output) with the powers -1/2, 1/2, 1, Adam with 0, 1,
        3/2.
        """
        slopes = {}
        for scaling in ("mup", "standard"):
            small, large = (one_step_changes(scaling, optimiser, width, range(3)) for width in (64, 1024))
            slopes[scaling] = (large / small).log() / math.log(16)
        assert bool((slopes["mup"].abs() < 0.12).all())
        expected = torch.tensor([-0.5, 0.5, 1.0] if optimiser == "sgd" else [0.0, 1.0, 1.5])
        assert bool(((slopes["standard"] - expected).abs() < 0.2).all())

    def test_rates_of_the_layers(self):
        network = random_network(make_problem(), (128, 32), "mup")
        adam = {"readout": 2.0, "kernels.0": 1.0, "kernels.1": 0.5, "bias_parameters.0": 1.0, "bias_parameters.1": 1.0}
        sgd = {"readout": 2.0, "kernels.0": 2.0, "kernels.1": 0.25, "bias_parameters.0": 2.0, "bias_parameters.1": 0.5}
        assert module.layer_rates(network, "adam") == adam
        assert module.layer_rates(network, "sgd") == sgd
        for scaling in SCALINGS[:3]:
            assert set(module.layer_rates(random_network(make_problem(), (128, 32), scaling), "sgd").values()) == {1.0}

    @pytest.mark.parametrize("optimiser", ["sgd", "adam"])
    def test_every_layer_moves_at_its_rate(self, optimiser):
        """SGD moves by -rate grad; Adam's first step is -rate grad / (|grad| + epsilon)."""
        problem = make_problem()
        network = random_network(problem, (6, 5), "mup")
        problem.terms(network.particles(attached=True)).total().backward()
        moved = copy.deepcopy(network)
        module._step(make_run(problem, moved, optimiser=optimiser, rate=1e-3))
        for (name, before), after in zip(network.named_parameters(), moved.parameters(), strict=True):
            direction = before.grad if optimiser == "sgd" else before.grad / (before.grad.abs() + 1e-8)
            expected = before - 1e-3 * module.layer_rates(network, optimiser)[name] * direction
            torch.testing.assert_close(after.detach(), expected.detach(), rtol=1e-11, atol=1e-14)

    @pytest.mark.parametrize("optimiser", ["sgd", "adam"])
    def test_at_the_base_width_it_is_standard_training(self, optimiser):
        problem = make_problem()
        widths = (BASE_WIDTH, BASE_WIDTH)
        start = random_network(problem, widths, "mup")
        mup, standard = (
            train(problem, widths, start=start, scaling=scaling, optimiser=optimiser, learning_rate=1e-4, steps=5)
            for scaling in ("mup", "standard")
        )
        assert comparable(mup.history) == comparable(standard.history)


class TestCheckpoints:
    def test_they_are_the_networks_of_the_first_steps_that_reach_the_times(self):
        """0.1 added eight times is less than 0.8, which yet belongs to step 8; 0.35 to step 4."""
        problem = make_problem()
        start = random_network(problem, (3, 4))
        times = (0.0, 0.1 * 3, 0.35, 0.8, 1.0)
        settings = {"optimiser": "sgd", "learning_rate": 0.1, "schedule": "constant", "steps": 10}
        kept = train(problem, (3, 4), start=start, checkpoints=times, **settings).checkpoints
        assert [moment for moment, _ in kept] == pytest.approx([0, 0.3, 0.4, 0.8, 1.0], rel=1e-12)
        course = make_run(problem, copy.deepcopy(start), rate=0.1)
        stepwise = [copy.deepcopy(course.network)]
        for _ in range(10):
            module._step(course)
            stepwise.append(copy.deepcopy(course.network))
        assert all(
            same_bits(network, stepwise[step]) for (_, network), step in zip(kept, (0, 3, 4, 8, 10), strict=True)
        )

    def test_exact_multiples_of_the_rate_hit_their_step(self):
        for rate in (0.1, 0.3, 1e-3, 7e-5):
            settings = module._Settings(
                "sgd", NAMED["mean_field"], rate, 3000, "constant", 0.0, [rate * k for k in range(3001)]
            )
            assert [step for step, _ in settings.checkpoints] == list(range(3001))

    def test_flow_time_of_the_cosine_schedule(self):
        rates = [0.1 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
        run = train(
            make_problem(),
            (3, 4),
            steps=20,
            optimiser="sgd",
            learning_rate=0.2,
            checkpoints=(sum(rates[:4]) - 1e-4, sum(rates)),
        )
        assert [moment for moment, _ in run.checkpoints] == pytest.approx([sum(rates[:4]), sum(rates)], rel=1e-12)

    def test_runs_of_other_rates_meet_at_equal_flow_times(self):
        """Euler's method of order one: halving the rate halves the distance between the outputs at flow time 1."""
        problem = make_problem()
        start = random_network(problem, (3, 4))
        outputs = []
        for rate in (0.04, 0.02, 0.01):
            settings = {"optimiser": "sgd", "learning_rate": rate, "schedule": "constant", "steps": round(1 / rate)}
            ((_, network),) = train(problem, (3, 4), start=start, checkpoints=(1.0,), **settings).checkpoints
            outputs.append(network(problem.inputs).detach())
        assert float((outputs[0] - outputs[1]).norm() / (outputs[1] - outputs[2]).norm()) == pytest.approx(2, abs=0.3)

    def test_they_change_nothing_else(self):
        plain, kept = (
            train(make_problem(), (4, 3), steps=30, batch_size=3, checkpoints=times) for times in ((), (0.2, 0.7))
        )
        assert plain.checkpoints == ()
        assert comparable(plain.history) == comparable(kept.history)

    def test_log_spaced_times(self):
        times = module.log_spaced_times(0.3, 30.0, 5)
        assert (times[0], times[-1]) == (0.3, 30.0)
        assert times == pytest.approx([0.3 * 10 ** (k / 2) for k in range(5)], rel=1e-14)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0.0, 1.0, 3), "first=0.0 must be greater than 0"),
            ((1.0, 1.0, 3), "last=1.0 must be greater than first=1"),
            ((1.0, 2.0, 1), "count=1 must be an integer of at least 2"),
        ],
    )
    def test_log_spaced_times_refuses(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            module.log_spaced_times(*arguments)


class TestNoise:
    def noise_of_one_step(self, seed, **settings):
        """Noisy step minus noiseless step, one tensor per parameter."""
        problem = make_problem()
        start = random_network(problem, (3, 4))
        moved = [copy.deepcopy(start), copy.deepcopy(start)]
        for network, noise in zip(moved, (0.3, 0.0), strict=True):
            module._step(make_run(problem, network, rate=0.02, noise=noise, seed=seed, **settings))
        return [(a - b).detach() for a, b in zip(*(network.parameters() for network in moved), strict=True)]

    def test_moments(self):
        """Mean 0, variance 2 * 0.3 * 0.02, no correlation of neighbours: within 4.5 standard errors of 400 steps,
        every parameter apart.
        """
        draws = [self.noise_of_one_step(seed) for seed in range(400)]
        for tensors in zip(*draws, strict=True):
            normal = torch.stack([tensor.flatten() for tensor in tensors]) / math.sqrt(2 * 0.3 * 0.02)
            assert abs(float(normal.mean())) < 4.5 / math.sqrt(normal.numel())
            assert abs(float(normal.square().mean()) - 1) < 4.5 * math.sqrt(2 / normal.numel())
            assert abs(float((normal[:, 1:] * normal[:, :-1]).mean())) < 4.5 / math.sqrt(normal[:, 1:].numel())

    def test_seed_decides_and_no_parameter_repeats_another(self):
        first, again, other = (
            torch.cat([tensor.flatten() for tensor in self.noise_of_one_step(seed)]) for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not bool(torch.isclose(first, other).any())
        assert len(first.unique()) == len(first)

    def test_it_follows_the_schedule(self):
        """The second of two cosine steps has half the rate, so half the variance."""
        problem = make_problem()
        settings, disturbed = module._Settings("sgd", NAMED["mean_field"], 0.02, 2, "cosine", 0.3), []
        for seed in range(200):
            networks = [random_network(problem, (3, 4)) for _ in range(2)]
            for network, chosen in zip(
                networks, (settings, module._Settings("sgd", NAMED["mean_field"], 0.02, 2, "cosine")), strict=True
            ):
                run = module._Run(problem, network, chosen, module._Batches(7, None, False, seeded(seed)))
                run.steps = 1
                module._step(run)
            disturbed += [
                (a - b).detach().flatten() for a, b in zip(*(network.parameters() for network in networks), strict=True)
            ]
        found = torch.cat(disturbed)
        assert abs(float(found.square().mean()) / (2 * 0.3 * 0.01) - 1) < 4.5 * math.sqrt(2 / len(found))

    def test_bounds_hold_after_the_noise(self):
        problem = make_problem(amplitude_bound=0.5, input_bound=0.6)
        run = train(problem, (5, 4), steps=20, optimiser="sgd", noise=0.5, checkpoints=(2.0,))
        assert problem.excess(run.checkpoints[0][1].particles()) < 1e-9

    @pytest.mark.parametrize("settings", [{"optimiser": "adam"}, {"optimiser": "sgd", "scaling": "ntk"}])
    def test_refused_elsewhere(self, settings):
        with pytest.raises(ValueError, match=r"noise=0\.1 needs optimiser='sgd' and scaling='mean_field', not"):
            train(make_problem(), (4, 3), noise=0.1, **settings)


class Interruption(Exception):
    pass


class TestResume:
    SETTINGS = (
        {"optimiser": "adam"},
        {"optimiser": "adam", "scaling": "mup", "batch_size": 3, "learning_rate": 1e-3},
        {"optimiser": "adam", "scaling": "ntk", "batch_size": 2, "shuffle": False, "schedule": "constant"},
        {"optimiser": "sgd", "batch_size": 3, "noise": 0.01, "checkpoints": (0.0, 1.0, 9.0)},
        {"optimiser": "sgd", "scaling": "standard", "batch_size": 5},
    )

    def stopped(self, path, at, problem=None, **settings):
        """A run that its callback stops at step `at`."""

        def stop(record):
            if record["step"] == at:
                raise Interruption

        with pytest.raises(Interruption):
            train(problem or make_problem(), (4, 3), state=path, state_every=7, callback=stop, **settings)

    @pytest.mark.parametrize("settings", SETTINGS)
    @pytest.mark.parametrize("at", [3, 29, 58])
    def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(self, tmp_path, settings, at):
        settings = {"steps": 60, **settings}
        path, seen = tmp_path / "run.safetensors", []
        self.stopped(path, at, **settings)
        assert path.exists() == (at > 7)
        resumed = train(make_problem(), (4, 3), state=path, state_every=7, callback=seen.append, **settings)
        whole = train(make_problem(), (4, 3), **settings)
        assert seen[0]["step"] == (0 if at < 7 else (at - 1) // 7 * 7 + 1)
        assert same_bits(resumed.network, whole.network)
        assert (resumed.value, resumed.steps, resumed.status) == (whole.value, whole.steps, whole.status)
        assert comparable(resumed.history) == comparable(whole.history)
        assert [moment for moment, _ in resumed.checkpoints] == [moment for moment, _ in whole.checkpoints]
        assert all(same_bits(a, b) for (_, a), (_, b) in zip(resumed.checkpoints, whole.checkpoints, strict=True))
        assert not list(tmp_path.iterdir())

    def test_stopped_twice_with_float32_and_a_given_start(self, tmp_path):
        problem, path = make_problem(dtype=torch.float32), tmp_path / "run.safetensors"
        settings = {"steps": 60, "batch_size": 3, "start": random_network(problem, (4, 3))}
        self.stopped(path, 20, problem, **settings)
        self.stopped(path, 50, problem, **settings)
        assert same_bits(
            train(problem, (4, 3), state=path, **settings).network, train(problem, (4, 3), **settings).network
        )

    def test_an_interrupt_from_the_keyboard_leaves_the_file(self, tmp_path):
        def stop(record):
            if record["step"] == 30:
                raise KeyboardInterrupt

        path = tmp_path / "run.safetensors"
        assert (
            train(make_problem(), (4, 3), steps=60, state=path, state_every=10, callback=stop).status == "interrupted"
        )
        resumed = train(make_problem(), (4, 3), steps=60, state=path)
        assert resumed.status == "completed"
        assert [record["seconds"] for record in resumed.history] == sorted(
            record["seconds"] for record in resumed.history
        )

    @pytest.mark.parametrize(
        ("changed", "name"),
        [
            ({"steps": 61}, "steps"),
            ({"seed": 1}, "seed"),
            ({"batch_size": 3}, "batch_size"),
            ({"learning_rate": 0.02}, "learning_rate"),
            ({"checkpoints": (0.1,)}, "checkpoints"),
            ({"problem": make_problem(source=2e-3)}, r"penalty\.source"),
            ({"problem": make_problem(dtype=torch.float32)}, "dtype"),
            ({"start": random_network(make_problem(), (4, 3))}, "start"),
        ],
    )
    def test_the_file_of_another_run_is_refused_and_kept(self, tmp_path, changed, name):
        path = tmp_path / "run.safetensors"
        self.stopped(path, 20, steps=60)
        before = path.read_bytes()
        with pytest.raises(
            ValueError, match=rf"run.safetensors' is of another run: its {name} is .*, here .*; repeat the arguments"
        ):
            train(**{"problem": make_problem(), "widths": (4, 3), "steps": 60, "state": path, **changed})
        assert path.read_bytes() == before

    @pytest.mark.parametrize("damage", ["cut", "flip", "figure", "other"])
    def test_a_damaged_file_is_refused(self, tmp_path, damage):
        path = tmp_path / "run.safetensors"
        self.stopped(path, 20, steps=60)
        content = path.read_bytes()
        if damage == "other":
            mf.storage.save_tensors({"readout": torch.ones(3)}, path)
        else:
            last, steps = bytes([content[-1] ^ 1]), content.replace(b'\\"steps\\": 14', b'\\"steps\\": 15')
            path.write_bytes({"cut": content[:-10], "flip": content[:-1] + last, "figure": steps}[damage])
            assert path.read_bytes() != content
        message = {"cut": "cannot be used: .*truncated", "other": "is no 'meanfield state 4'"}.get(
            damage, "cannot be used: .* is damaged: its checksum"
        )
        with pytest.raises(ValueError, match=f"run.safetensors' {message}"):
            train(make_problem(), (4, 3), steps=60, state=path)

    def test_paths(self, tmp_path):
        with pytest.raises(ValueError, match=r"state='.*run.pt' must end in .safetensors"):
            train(make_problem(), (4, 3), state=tmp_path / "run.pt")
        with pytest.raises(
            ValueError, match=r"state='.*' lies in a directory that does not exist: create .*none first"
        ):
            train(make_problem(), (4, 3), state=tmp_path / "none" / "run.safetensors")


class TestResult:
    @pytest.mark.parametrize("scaling", SCALINGS)
    @pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
    def test_value_is_the_objective_of_the_returned_network(self, scaling, loss):
        problem = make_problem(loss=loss)
        run = train(problem, (5, 4), scaling=scaling, steps=60)
        assert run.value == pytest.approx(float(problem.value(run.network.particles())), rel=1e-13)
        assert run.value == pytest.approx(min(record["value"] for record in run.history), rel=1e-13)
        assert run.value < 0.8 * run.history[0]["value"]
        assert (run.status, run.steps, run.network.widths, run.network.scaling.name) == (
            "completed",
            60,
            (5, 4),
            scaling,
        )
        assert f"J = {run.value:.6g} after 60 steps" in run.message

    def test_records(self):
        seen = []
        run = train(make_problem(), (4, 3), steps=250, learning_rate=0.02, callback=seen.append)
        assert seen == run.history
        assert [record["step"] for record in seen] == list(range(0, 251, 2))
        for record in seen:
            assert record["value"] == pytest.approx(
                sum(record[term] for term in ("loss", "source", "readout", "input")), rel=1e-12
            )
            assert record["learning_rate"] == pytest.approx(
                0.01 * (1 + math.cos(math.pi * record["step"] / 250)), abs=1e-15
            )
        assert seen[-1]["seconds"] <= run.seconds

    def test_last_step_is_always_recorded(self):
        assert [record["step"] for record in train(make_problem(), (4, 3), steps=205).history[-2:]] == [204, 205]

    def test_constant_schedule(self):
        run = train(make_problem(), (4, 3), steps=5, learning_rate=0.02, schedule="constant")
        assert {record["learning_rate"] for record in run.history} == {0.02}

    def test_the_best_network_is_returned_not_the_last(self):
        run = train(
            make_problem(), (4, 3), steps=100, optimiser="sgd", learning_rate=12.0, schedule="constant", batch_size=1
        )
        values = [record["value"] for record in run.history]
        assert values[-1] > 1.05 * min(values)
        assert run.value == pytest.approx(min(values), rel=1e-13)

    def test_seed_decides(self):
        settings = {"steps": 20, "batch_size": 3}
        first, again, other = (train(make_problem(), (4, 3), seed, **settings) for seed in (1, 1, 2))
        assert first.value == again.value
        assert all(torch.equal(a, b) for a, b in zip(first.network.parameters(), again.network.parameters()))
        assert first.value != other.value

    def test_float32(self):
        start = random_network(make_problem(), (5, 4)).particles()
        run = train(make_problem(dtype=torch.float32), (5, 4), steps=60, start=start.to(dtype=torch.float32))
        assert {parameter.dtype for parameter in run.network.parameters()} == {torch.float32}
        assert run.value == pytest.approx(train(make_problem(), (5, 4), steps=60, start=start).value, rel=1e-3)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda(self):
        cpu = train(make_problem(), (5, 4), steps=60, batch_size=3)
        gpu = train(make_problem().to(device="cuda"), (5, 4), steps=60, batch_size=3)
        assert gpu.network.readout.is_cuda
        assert gpu.value == pytest.approx(cpu.value, rel=1e-6)


class TestBatches:
    def test_an_epoch_has_every_image_once(self):
        shuffled = module._Batches(7, 3, True, seeded(0))
        epochs = [[next(shuffled) for _ in range(3)] for _ in range(2)]
        assert [[len(batch) for batch in epoch] for epoch in epochs] == [[3, 3, 1]] * 2
        assert all(torch.cat(epoch).sort().values.tolist() == list(range(7)) for epoch in epochs)
        assert torch.cat(epochs[0]).tolist() != torch.cat(epochs[1]).tolist()
        fixed = module._Batches(7, 3, False, seeded(0))
        assert [next(fixed).tolist() for _ in range(4)] == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]

    def test_one_batch_of_all_images_is_the_full_gradient(self):
        whole, batch = (train(make_problem(), (4, 3), steps=20, batch_size=size, shuffle=False) for size in (None, 7))
        assert whole.value == batch.value

    def test_batches_train(self):
        run = train(make_problem(), (8, 6), steps=150, batch_size=2)
        assert run.value < 0.6 * run.history[0]["value"]


def input_parameters(particles, factor):
    """Kernels and biases of the first layer as a network has them whose kernels times `factor` are z."""
    return particles.kernels[0] / factor, particles.biases[0][:, None]


class TestBounds:
    @pytest.mark.parametrize("scaling", SCALINGS)
    @pytest.mark.parametrize("norm", ["l2", "l1"])
    def test_bounds_hold_and_bind(self, scaling, norm):
        free = train(make_problem(), (5, 4), scaling=scaling, steps=60).network.particles()
        problem = make_problem(kernel_norm=norm, amplitude_bound=0.5, input_bound=0.6)
        assert problem.excess(free) > 0.2
        run = train(problem, (5, 4), scaling=scaling, steps=60)
        reached = {name: value / bound for name, value, bound in problem.bounds(run.network.particles())}
        assert reached["input_bound"] == pytest.approx(1, abs=1e-9)
        assert reached["amplitude_bound"] == pytest.approx(1, abs=1e-9)
        assert math.isfinite(run.value)
        assert run.value < 0.98 * run.history[0]["value"]

    @pytest.mark.parametrize("scaling", SCALINGS)
    @pytest.mark.parametrize("norm", ["l2", "l1"])
    def test_projection_is_the_nearest_point(self, norm, scaling):
        """v = P(w): <w - v, y - v> <= 0 for all feasible y, that is (B / p) max_i |w_i - v_i|* = <w - v, v> for every
        target.
        """
        problem = make_problem(kernel_norm=norm, amplitude_bound=1.0, input_bound=2.0)
        network = random_network(problem, (6, 5), scaling, seed=1)
        with torch.no_grad():
            network.kernels[1][0].mul_(0.05)  # a target inside the bound stays as it is
        before = network.particles()
        module._project(network, problem)
        after = network.particles()
        step = before.kernels[1] - after.kernels[1]
        outside = problem.penalty.norms(before.kernels[1]) @ before.masses[0] > 1.0
        assert outside.tolist() == [False, True, True, True, True]
        support = 1.0 * 6 * problem.penalty.dual_norms(step).amax(1)
        torch.testing.assert_close((step * after.kernels[1]).flatten(1).sum(1), support, rtol=1e-10, atol=1e-12)
        assert float(step[0].abs().max()) < 1e-14
        assert bool((step[1:].flatten(1).abs().amax(1) > 0.01).all())
        torch.testing.assert_close(after.biases[1], before.biases[1].clamp(-1, 1))
        norms = mf.penalties.input_norms(before.kernels[0], before.biases[0])
        assert bool((norms > 2).any())
        torch.testing.assert_close(
            mf.penalties.input_norms(after.kernels[0], after.biases[0]), norms.clamp_max(2.0), rtol=1e-12, atol=0
        )
        # what the parameters lose is normal to the ball |c w|^2 + b^2 <= 4 of (w, b), in their own metric
        factor = network.mean_field_factors[0]
        lost = [(b - a).flatten(1) for b, a in zip(input_parameters(before, factor), input_parameters(after, factor))]
        normals = (factor * after.kernels[0].flatten(1), after.biases[0][:, None])
        multiplier = sum((each * normal).sum(1) for each, normal in zip(lost, normals)) / sum(
            normal.square().sum(1) for normal in normals
        )
        assert bool((multiplier[norms > 2] > 0).all())
        for each, normal in zip(lost, normals):
            torch.testing.assert_close(each, multiplier[:, None] * normal, rtol=1e-9, atol=1e-12)

    def test_given_start_that_breaks_a_bound_is_refused(self):
        problem = make_problem(input_bound=0.1)
        with pytest.raises(ValueError, match=r"input_bound=0.1 makes the network infeasible: it reaches"):
            train(problem, (3, 4), start=random_network(problem, (3, 4)))


class TestStart:
    @pytest.mark.parametrize("scaling", SCALINGS)
    def test_given_start_is_used_and_left_alone(self, scaling):
        problem = make_problem()
        start = random_network(problem, (3, 4))
        before = copy.deepcopy(start.state_dict())
        for given in (start, start.particles()):
            run = train(problem, (3, 4), start=given, scaling=scaling, steps=5)
            assert run.history[0]["value"] == pytest.approx(float(problem.value(start.particles())), rel=1e-12)
            assert run.network.scaling.name == scaling
        assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())

    def test_random_mean_field_start_is_the_particle_start(self):
        problem = make_problem()
        start = starts.start(problem.architecture, (5, 4), problem.inputs, seeded(3))
        assert train(problem, (5, 4), 3, steps=1).history[0]["value"] == pytest.approx(
            float(problem.value(start)), rel=1e-12
        )


class TestEndings:
    def test_interrupt_keeps_the_best_so_far(self):
        def stop(record):
            if record["step"] == 30:
                raise KeyboardInterrupt

        run = train(make_problem(), (4, 3), steps=100, callback=stop)
        assert (run.status, run.steps) == ("interrupted", 30)
        assert run.value == pytest.approx(min(record["value"] for record in run.history), rel=1e-13)
        assert "stopped by the user; the best network so far is kept" in run.message

    @pytest.mark.parametrize("rate", [1e3, 1e200])
    def test_divergence_is_a_status(self, rate):
        run = train(
            make_problem(bias=False), (4, 3), steps=100, optimiser="sgd", learning_rate=rate, schedule="constant"
        )
        assert run.status == "diverged"
        assert run.steps < 100
        assert run.value == pytest.approx(
            min(record["value"] for record in run.history if record["value"] > 0), rel=1e-13
        )
        assert "lower the learning rate" in run.message


@pytest.mark.slow
class TestKnownOptima:
    def test_one_layer_reaches_the_exact_infinite_width_optimum_from_above(self):
        """Nothing may lie below the optimum over all measures; 64 channels end close to it; 2 channels can be caught
        far above (seed 0).
        """
        problem = one_layer_problem()
        wide = [train(problem, (64,), seed, steps=800, learning_rate=0.1).value - EXACT_ONE_LAYER for seed in (0, 1)]
        assert all(-1e-10 < excess < 1e-3 for excess in wide)
        narrow = train(problem, (2,), 0, steps=800, learning_rate=0.1).value - EXACT_ONE_LAYER
        assert narrow > 5 * max(wide)

    def test_digits_values_fall_with_the_width_towards_the_best_known(self):
        values = [digits(widths, steps=800).value for widths in ((2, 2), (30, 12))]
        assert 0.0195 < values[1] < 0.028 < values[0]


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"optimiser": "adan"}, "optimiser='adan' is unknown.*did you mean 'adam'"),
            (
                {"scaling": "meanfield"},
                r"scaling='meanfield' is unknown: choose one of 'mean_field', 'ntk', 'standard', 'mup'; did you mean "
                r"'mean_field'\?",
            ),
            ({"schedule": "cosin"}, "schedule='cosin' is unknown.*did you mean 'cosine'"),
            ({"start": "randm"}, "start='randm' is unknown.*did you mean 'random'"),
            ({"learning_rate": 0.0}, "learning_rate=0.0 must be greater than 0"),
            ({"learning_rate": -1}, "learning_rate=-1 must be a finite number of at least 0"),
            ({"steps": 0}, "steps=0 must be an integer of at least 1"),
            ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
            ({"batch_size": 8}, "batch_size=8 is more than the 7 images; use None for all of them"),
            ({"shuffle": "yes"}, "shuffle='yes' must be True or False"),
            ({"noise": -0.1, "optimiser": "sgd"}, "noise=-0.1 must be a finite number of at least 0"),
            ({"state_every": 0}, "state_every=0 must be an integer of at least 1"),
            ({"checkpoints": 0.5}, "checkpoints=0.5 must be a sequence of flow times"),
            ({"checkpoints": (0.5, 0.5)}, r"checkpoints=\(0.5, 0.5\) must be increasing flow times"),
            ({"checkpoints": (-1,)}, "checkpoints=-1 must be a finite number of at least 0"),
            (
                {"checkpoints": (0.1, 1.1), "learning_rate": 0.1, "steps": 10, "schedule": "constant"},
                r"checkpoints=\(0.1, 1.1\) go beyond the total flow time 1 of the 10 steps: choose times up to it, "
                r"more steps or a larger",
            ),
            ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
            ({"widths": (4,)}, r"widths=\(4,\) has 1 entries; the architecture has 2 layers"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            train(make_problem(), **{"widths": (4, 3), **settings})

    def test_start_of_the_wrong_kind(self):
        problem = make_problem()
        with pytest.raises(TypeError, match="start must be 'random', a ParticleNetwork or a FiniteCNN, not int"):
            train(problem, (4, 3), start=3)
        with pytest.raises(ValueError, match=r"widths=\(4, 3\) differ from those of start, \(3, 4\)"):
            train(problem, (4, 3), start=random_network(problem, (3, 4)))
        with pytest.raises(ValueError, match="the network has the architecture"):
            train(digits(), (3, 4), start=random_network(problem, (3, 4)))
        with pytest.raises(ValueError, match=r"the network is torch.float64 on cpu, the problem torch.float32 on cpu"):
            train(make_problem(dtype=torch.float32), (3, 4), start=random_network(problem, (3, 4)))

    def test_uneven_start(self):
        problem = make_problem()
        even = random_network(problem, (2, 4)).particles()
        masses = [torch.tensor([0.3, 0.7], dtype=torch.float64), even.masses[1]]
        uneven = mf.ParticleNetwork(problem.architecture, masses, even.kernels, even.readout, even.biases)
        with pytest.raises(ValueError, match=r"masses\[0\] are not uniform"):
            train(problem, (2, 4), start=uneven)


def test_records_are_as_far_apart_as_asked():
    often, seldom = (train(make_problem(), (4, 3), steps=7, record_every=every) for every in (1, 3))
    assert [row["step"] for row in often.history] == list(range(8))
    assert [row["step"] for row in seldom.history] == [0, 3, 6, 7]
    assert comparable(seldom.history) == comparable([row for row in often.history if row["step"] in (0, 3, 6, 7)])
    with pytest.raises(ValueError, match="record_every=0 must be an integer of at least 1"):
        train(make_problem(), (4, 3), record_every=0)
