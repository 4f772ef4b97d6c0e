"""Limits of a run: wherever it is stopped, by the clock, the user or a lack of memory, it keeps its best network."""

import math
from dataclasses import replace

import pytest
import torch
from strategies import seeded

import meanfield as mf
from meanfield import limits
from meanfield.bench import distances
from meanfield.certificates import compositions, search
from meanfield.finite import training
from meanfield.solvers import alternating


class Looks:
    """The clock of `limits`, which ends work at a given look: by its time, or by an error raised there."""

    def __init__(self, monkeypatch, last: int, error: type[BaseException] | None) -> None:
        self.count, self.last, self.error, self.late = 0, last, error, 0.0
        monkeypatch.setattr(limits, "passed", self.passed)

    def passed(self, in_step: bool = True) -> bool:
        self.count += 1
        if self.count <= self.last:
            return False
        if self.error is None:
            return True
        error, self.error, self.last = self.error, None, math.inf
        raise error


def small_problem() -> mf.Problem:
    generator = seeded(3)
    arch = mf.Architecture((1, 4, 4), [mf.Conv(3, padding=1, activation="tanh")] * 2)
    inputs = torch.rand(5, 1, 4, 4, generator=generator, dtype=torch.float64)
    penalty = mf.Penalty(source=3e-3, readout=3e-3, input=3e-3)
    return mf.Problem(arch, inputs, [1.0, -1.0, 1.0, 1.0, -1.0], "logistic", penalty)


def run(problem, network):
    options = {"rounds": 2, "flow_steps": 6, "program_iterations": 60, "tolerance": 1e-9, "grow": 2}
    return alternating.solve(problem, network, **options)


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "max_seconds"), (KeyboardInterrupt, "interrupted"), (MemoryError, "out_of_memory")],
    ids=["time", "interrupt", "memory"],
)
def test_a_solve_stopped_at_any_look_keeps_its_best_network(monkeypatch, error, status):
    monkeypatch.setattr(alternating, "STARTS", 4)
    monkeypatch.setattr(alternating, "CONFIRMING_STARTS", 4)
    monkeypatch.setattr(search, "STEPS", {True: 3, False: 3})
    problem = small_problem()
    start = mf.starts.draw(problem, (5, 4), seeded(1), "low_rank")
    counted = Looks(monkeypatch, 10**9, None)
    whole = run(problem, start)
    seen, first = counted.count, float(problem.value(start))
    phases = set()
    for last in sorted({1, 2, *range(3, seen, max(1, seen // 12)), seen - 1}):
        stopped_at = Looks(monkeypatch, last, error)
        solution = run(problem, start)
        assert solution.status == status
        assert solution.value == pytest.approx(float(problem.value(solution.network)), rel=1e-12)
        assert whole.value <= solution.value <= first
        assert (solution.certificate is None) == math.isinf(solution.gap)
        assert solution.certificate is None or solution.gap >= -1e-12
        assert stopped_at.count <= last + (seen if error else 5)  # by the clock: nothing is begun after it
        phases.add((len(solution.history), solution.certificate is None))
    assert {(0, True), (1, False)} <= phases or error


def test_an_inner_limit_ends_no_later_than_the_outer_one_and_grace_allows_a_moment():
    with limits.within(-1):
        assert limits.passed()
        with limits.within(100):
            assert limits.passed()
        with limits.grace(100):
            assert not limits.passed()
        with pytest.raises(limits.TimeUp):
            limits.look()
    assert not limits.passed()


def test_who_watches_is_called_at_every_look():
    calls = []
    with limits.watched(lambda: calls.append(1)):
        limits.look()
        limits.passed()
    limits.look()
    assert len(calls) == 2


@pytest.mark.parametrize(("each", "sizes"), [(1, [7]), (32, [3, 3, 1]), (100, [1] * 7), (10**9, [1] * 7)])
def test_blocks_take_what_fits_and_at_least_one_image(monkeypatch, each, sizes):
    monkeypatch.setattr(limits, "BLOCK_BYTES", 100)
    found = list(limits.blocks(7, each))
    assert [block.stop - block.start for block in found] == sizes
    assert [block.start for block in found] + [7] == [0] + [block.stop for block in found]


def test_the_time_is_looked_at_between_blocks(monkeypatch):
    monkeypatch.setattr(limits, "BLOCK_BYTES", 1)
    with limits.within(-1):
        blocks = limits.blocks(3, 1)
        assert next(blocks) == slice(0, 1)
        with pytest.raises(limits.TimeUp):
            next(blocks)


def test_a_shortage_that_torch_reports_is_told_from_a_mistake():
    with pytest.raises(RuntimeError) as shortage:
        torch.empty(2**46)
    assert limits.status(shortage.value) == "out_of_memory"
    with pytest.raises(RuntimeError) as mistake:
        torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):
        limits.status(mistake.value)


@pytest.mark.parametrize(("widths", "kernel"), [((10**10, 4), 3), ((10**20, 4), 3), ((64, 32), 4_000_001)])
def test_kernels_that_no_memory_holds_are_refused_before_any_is_drawn(widths, kernel):
    layers = [mf.Conv(kernel, padding=kernel // 2, activation="tanh")] * 2
    arch = mf.Architecture((1, 4, 4), layers)
    problem = mf.Problem(arch, torch.zeros(2, 1, 4, 4), [1.0, -1.0])
    with pytest.raises(ValueError, match=r"widths=.*kernel_size.*GiB.*take fewer particles or smaller kernels"):
        mf.starts.draw(problem, widths, seeded(0))
    with pytest.raises(
        ValueError, match=r"widths=.* 2 images of 1 x 4 x 4 needs about .*GiB.*(what fits|take smaller)"
    ):
        mf.solve(problem, widths)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_flow_without_any_time_returns_its_start_however_many_blocks_it_takes(monkeypatch, batch_size):
    monkeypatch.setattr(limits, "BLOCK_BYTES", 1)
    problem = small_problem()
    network = mf.starts.draw(problem, (3, 3), seeded(1), "low_rank")
    solution = mf.solvers.flow.solve(problem, network, batch_size=batch_size, max_seconds=0)
    assert solution.status == "max_seconds"
    assert solution.history[-1]["step"] == 0
    assert solution.value == pytest.approx(float(problem.value(network)), rel=1e-12)
    assert mf.solvers.alternating.solve(problem, network, max_seconds=0).status == "max_seconds"


def test_a_training_heeds_a_limit_around_it_and_keeps_its_best(tmp_path):
    problem = small_problem()
    state = tmp_path / "run.safetensors"
    with limits.within(-1):
        stopped = mf.finite.train(problem, (4, 4), steps=50, state=state)
    assert (stopped.status, stopped.steps) == ("max_seconds", 0)
    assert stopped.value == pytest.approx(float(problem.value(stopped.network.particles())))


@pytest.mark.parametrize("value", [math.nan, -1.0, True, "5"])
@pytest.mark.parametrize("solver", ["flow", "splitting", "alternating"])
def test_times_that_are_none_are_refused(solver, value):
    problem = small_problem()
    network = mf.starts.draw(problem, (3, 3), seeded(1), "low_rank")
    subject = [mf.ConvexProgram.freeze(problem, network)] if solver == "splitting" else [problem, network]
    with pytest.raises(ValueError, match="max_seconds="):
        getattr(mf.solvers, solver).solve(*subject, max_seconds=value)


def whole_and_in_blocks():
    """Everything that runs in blocks, each from a problem of five images and a network of widths (4, 3)."""
    layers = [mf.Conv(3, padding=1, activation="tanh", bias=True, pooling="average"), mf.Conv(2, activation="tanh")]
    arch = mf.Architecture((2, 5, 4), layers, "flatten", 3)
    inputs = torch.rand(5, 2, 5, 4, generator=seeded(0), dtype=torch.float64)
    problem = mf.Problem(arch, inputs, [0, 1, 2, 1, 0], "softmax", mf.Penalty(source=3e-3, readout=3e-2, input=3e-3))
    network = mf.starts.draw(problem, (4, 3), seeded(1), "low_rank")
    other = mf.starts.draw(problem, (4, 3), seeded(2), "low_rank")
    program = mf.ConvexProgram.freeze(problem, network)
    point = program.point(network)
    output = problem.loss.gradient(problem.output(network), problem.targets) / 5
    finite = mf.finite.FiniteCNN.from_particles(network)
    one_output = mf.finite.FiniteCNN.random(replace(arch, outputs=1), (4, 3), inputs, seeded(4), "ntk")
    measure = lambda net: distances.FeatureMeasure.of(net, inputs, 1)  # noqa: E731

    def projected(space):
        return space.right @ space.right.T

    def sloped():
        found = compositions.own_features(problem, network, 4)
        leaf = found.kernels[0].detach().clone().requires_grad_()
        return torch.autograd.grad(
            replace(found, kernels=(leaf, *found.kernels[1:])).responses(problem, output).log().sum(), leaf
        )[0]

    def pulled():
        finite.zero_grad()
        training._pull_back(problem, finite)
        return [parameter.grad for parameter in finite.parameters()]

    def searched():
        found = mf.certificates.search_features(problem, output, network, starts=4, steps=2, rounds=1, count=3)
        return [torch.tensor(found.bound), found.scores, *found.features.tensors()]

    return {
        "value": lambda: problem.value(network),
        "responses": lambda: network(inputs),
        "velocity": lambda: mf.solvers.velocities.velocity(problem, network)[1].kernels,
        "start, anchored": lambda: mf.starts.start(arch, (4, 3), inputs, seeded(3)).tensors(),
        "start, low rank": lambda: mf.starts.start(arch, (4, 3), inputs, seeded(3), "low_rank").tensors(),
        "freeze": lambda: [
            tensor
            for frozen in [mf.ConvexProgram.freeze(problem, network)]
            for tensor in (frozen.readout_features, *map(projected, frozen.spaces))
        ],
        "violation": lambda: torch.tensor(program.violation(point.map(lambda t: 1.5 * t))),
        "multipliers": lambda: list(mf.certificates.stationary_multipliers(program, point).realisation),
        "unseen features": lambda: compositions.own_features(problem, network, 4).responses(problem, output),
        "their slopes": sloped,
        "own features": lambda: compositions.OwnFeatures(network).responses(problem, output),
        "search": searched,
        "features": lambda: measure(network).values,
        "Wasserstein": lambda: torch.tensor(distances.wasserstein(measure(network), measure(other))),
        "close pairs": lambda: torch.tensor(distances.mmd(measure(network), measure(network)).bandwidths),
        "sliced": lambda: torch.tensor(
            distances.sliced_wasserstein(measure(network), measure(other), generator=seeded(5), projections=70).squared
        ),
        "finite training": pulled,
        "finite network": lambda: torch.no_grad()(finite)(inputs),
        "tangent kernel": lambda: mf.finite.kernel.empirical(one_output, inputs),
    }


@pytest.mark.parametrize("size", [1, 5000, 30_000])
def test_blocks_of_any_size_give_the_same(monkeypatch, size):
    """Up to the order of sums; the default takes all five images at once."""
    seen: list[int] = []
    counted, blocks = limits.blocks, whole_and_in_blocks()

    def counting(count, each):
        found = list(counted(count, each))
        seen.append(len(found))
        return iter(found)

    whole = {name: compute() for name, compute in blocks.items()}
    monkeypatch.setattr(limits, "blocks", counting)
    monkeypatch.setattr(limits, "BLOCK_BYTES", size)
    for name, compute in blocks.items():
        seen.clear()
        found = compute()
        assert max(seen, default=1) > 1 or size > 5000 or name == "sliced", name
        as_list = lambda value: [value] if isinstance(value, torch.Tensor) else list(value)  # noqa: E731
        for one, other in zip(as_list(whole[name]), as_list(found), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_blocks_follow_an_allowed_memory_and_nothing_that_is_free(monkeypatch):
    monkeypatch.setattr(limits, "free_memory", lambda _: 10**9)
    monkeypatch.setattr(limits, "held_memory", lambda device="cpu": 3 * 10**8)
    assert limits.block_bytes() == limits.BLOCK_BYTES
    assert limits.available() == 0.8 * 10**9
    with limits.memory(0.5):
        assert limits.block_bytes() == limits.BLOCK_SHARE * 2**29 < limits.BLOCK_BYTES
        assert limits.available() == 2**29 - 3 * 10**8
        with limits.memory("3 GiB"):
            assert limits.available() == 2**29 - 3 * 10**8
        monkeypatch.setattr(limits, "held_memory", lambda device="cpu": 2**30)
        assert limits.available() == 0
        with pytest.raises(ValueError, match=r"max_memory=0.9 is less than the 1024 MiB that this process holds"):
            limits.memory(0.9)
    assert limits.block_bytes() == limits.BLOCK_BYTES
