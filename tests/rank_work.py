"""What a rank of `test_ranks.py` does: python rank_work.py DIRECTORY WORK, with the environment of torchrun.

Its findings go to DIRECTORY/RANK.pt; `findings` without a process group are those of one rank.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from strategies import normal, seeded

import meanfield as mf
from meanfield import certificates, folds, limits, ranks, starts
from meanfield.bench import signals
from meanfield.convex.program import ConvexProgram
from meanfield.solvers import alternating, velocities

PRICES = {"source": 3e-3, "readout": 3e-3, "input": 3e-3}
CASES = {  # images, layers, loss, penalty, readout
    "average": (7, 2, "squared", mf.Penalty(**PRICES), "average"),
    "flatten": (5, 3, "softmax", mf.Penalty(**PRICES, amplitude_bound=1.5), "flatten"),
    "bias": (6, 2, "logistic", mf.Penalty(**PRICES, kernel_norm="l1", amplitude_bound=2.0, input_bound=2.0), "average"),
    "one layer": (4, 1, "squared", mf.Penalty(readout=3e-3, input=3e-3), "average"),
    "one image": (1, 2, "squared", mf.Penalty(**PRICES), "average"),
}


def problem(images, depth, loss, penalty, readout):
    layers = tuple(
        mf.Conv(2, 1, 1 + index % 2, "tanh", ("none", "average", "max")[index], bias="logistic" in loss)
        for index in range(depth)
    )
    outputs = {"squared": 2, "softmax": 3, "logistic": 1}[loss]
    targets = {
        "squared": normal((images, 2), 1),
        "softmax": torch.arange(images) % 3,
        "logistic": 1.0 - 2.0 * (torch.arange(images) % 2),
    }[loss]
    return mf.Problem(
        mf.Architecture((1, 5, 4), layers, readout, outputs), normal((images, 1, 5, 4), 0), targets, loss, penalty
    )


def vector(tangent):
    return torch.cat([t.flatten() for t in (*tangent.masses, *tangent.kernels, tangent.readout)])


def findings(group, names=tuple(CASES)):
    """Everything that sums, gathers or compares over images."""
    found = {}
    for name in names:
        case = CASES[name]
        whole = problem(*case)
        own, widths = whole.sharded(group), (6, 5, 4)[: whole.architecture.depth]
        start = starts.draw(whole, widths, seeded(2), "low_rank")
        terms, tangent = velocities.velocity(own, start)
        batch = torch.randperm(whole.count, generator=seeded(3))[: max(1, whole.count // 2)]
        program = ConvexProgram.freeze(own, start)
        point = program.point(start)
        pulls = certificates.stationary_multipliers(program, point)
        other = program.point(start).map(lambda t: t + 0.01 * normal(t.shape, t.numel()))
        certificate = certificates.certify(program, point)
        rounds = 3 if name in ("average", "flatten") else 1
        solved = alternating.solve(
            own, start, rounds=rounds, flow_steps=20, tolerance=1e-9, program_iterations=60, clones=[1] * len(widths)
        )
        found[name] = {
            "images": len(own.inputs),
            "value": own.value(start),
            "output": own.output(start),
            "loss": terms.loss,
            "velocity": vector(tangent),
            "batch": vector(velocities.velocity(own.batch(batch), start)[1]),
            "projectors": [space.right @ space.right.T for space in program.spaces],
            "features": program.readout_features,
            "multipliers": [pulls.output, *pulls.realisation],
            "violation": torch.tensor(program.violation(other)),
            "certificate": torch.tensor([certificate.value, certificate.dual_value, certificate.violation]),
            "rounds": torch.tensor([[row["flow_value"], row["value"], row["gap"]] for row in solved.history]),
        }
    return found


def three(group):
    return findings(group, ("flatten", "one image"))


def deaf(group):
    """The control: sums stay with the rank that has them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(ranks.Ranks, "total", lambda self, fold, zero: sum(fold.values, zero))
    whole = problem(*CASES["average"])
    terms, tangent = velocities.velocity(whole.sharded(group), starts.draw(whole, (6, 5), seeded(2), "low_rank"))
    patch.undo()
    return {"loss": terms.loss, "velocity": vector(tangent)}


def long(group, act=lambda: None, seconds=60.0):
    """A solve of many steps; at its second record something happens."""
    whole = problem(*CASES["average"])
    start = starts.draw(whole, (6, 5), seeded(2), "low_rank")
    rows = []

    def callback(row):
        if "value" not in row:  # a glimpse, of each rank's own time
            return
        rows.append(row)
        if len(rows) == 2:
            act()

    own, steps = whole.sharded(group), {"flow_steps": 10**4, "max_seconds": seconds}
    with signals.heard(), signals.waiting(), limits.watched(signals.look):
        solved = alternating.solve(own, start, callback=callback, **steps)
    return solved.status, len(rows), solved.value, solved.certificate is not None


def late(group):
    """Rank 0's clock counts; the other one runs ahead of it."""
    patch = pytest.MonkeyPatch()
    if group.own:
        patch.setattr(time, "perf_counter", lambda: 1e9)
    found = long(group, seconds=0.5)
    patch.undo()
    return found


def interrupted(group):
    return long(group, lambda: os.kill(os.getpid(), signal.SIGTERM) if group.own == 1 else None)


def resumed(group):
    """One round, then another from a file that rank 0 alone can see."""
    whole = problem(*CASES["average"])
    start, directory = starts.draw(whole, (6, 5), seeded(2), "low_rank"), Path(sys.argv[1]) / f"disk of {group.own}"
    if group.own == 0:
        directory.mkdir()
    options = {"flow_steps": 20, "program_iterations": 60, "tolerance": 1e-9, "state": directory / "state.safetensors"}
    for rounds in (1, 2):
        solved = alternating.solve(whole.sharded(group), start, rounds=rounds, **options)
    return [row["value"] for row in solved.history], directory.exists()


def two(group):
    return {work.__name__: work(group) for work in (findings, deaf, late, interrupted, resumed)}


def failing(group):
    def fail():
        if group.own == 1:
            raise ZeroDivisionError

    return long(group, fail)


if __name__ == "__main__":
    directory, work = sys.argv[1:]
    folds.LEAST_PIXELS = 1  # so that a few images make several runs
    with ranks.together() as group:
        found = globals()[work](group)
    torch.save(found, Path(directory) / f"{group.own}.pt")
