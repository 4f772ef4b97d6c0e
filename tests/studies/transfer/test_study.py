"""The transfer study: its cells, small real runs of the parts on displacements, its command."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from command_line import run
from strategies import seeded

from meanfield import transfer
from meanfield.bench.classifiers import Classifier
from meanfield.bench.sweep import select
from meanfield.finite import FiniteCNN, evaluate
from meanfield.finite.statistics import norms
from meanfield.rates import mean
from meanfield.studies.transfer import arms, plan, steps, widths
from meanfield.studies.transfer.alphas import alphas
from meanfield.studies.transfer.arms import Draw, Trained, fresh, literal
from meanfield.studies.transfer.judged import divided
from meanfield.studies.transfer.plan import SIZES, Subject, ended
from meanfield.studies.transfer.regimes import regimes
from meanfield.studies.transfer.study import STUDY

BASE = Classifier(network="cnn", penalty="none", strength=0.0, split=0, samples=120, pool=2)
TINY = ended(BASE.variant(network="mlp", width=6), 2)


@pytest.mark.parametrize("size", SIZES)
def test_the_plan_trains_what_is_measured_once(size):
    found = STUDY.plan(Subject(BASE), SIZES[size])
    trained = [Classifier.from_dict(cell) for cell in found["train"]]
    assert len(set(trained)) == len(trained)
    needed = [
        Classifier.from_dict(each)
        for part in STUDY.parts
        for cell in found.get(part, ())
        for each in cell.get("networks", ())
    ]
    assert set(trained) == set(needed)
    if size != "cifar":
        assert set(STUDY.parts) < set(found)


def test_one_network_and_one_width_are_those_of_every_part():
    found = STUDY.plan(Subject(BASE, "vgg8", 4), SIZES["default"])
    cells = [cell for part in ("alphas", "regimes", "fusion") for cell in found.get(part, ())]
    networks = [each for cell in cells for each in cell["networks"]]
    assert {each["network"] for each in networks} == {"vgg8"}
    assert {each["width"] for each in networks} <= {4, 6}  # a third parent is half as wide again


def test_classes_are_divided_into_tasks_of_two_at_least():
    assert plan._divided(10, 5) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert plan._divided(7, 2) == [[0, 1, 2, 3], [4, 5, 6]]
    few = replace(SIZES["full"], tasks={"five tasks": 1})
    assert len(plan.tasks(Subject(BASE), few, 0)) == 2 * len(few.methods)
    assert plan._divided(9, 5)[-1] == [8]


def test_images_are_divided_once_for_all():
    division = divided(TINY)
    counts = [len(images) for images, _ in division]
    assert counts[0] == 120
    assert counts[2] - counts[1] in (0, 1)
    assert sum(counts) == 1797


def test_alpha_one_on_the_own_start_is_the_trained_network(tmp_path):
    other, permuted = TINY.variant(seed=1), TINY.variant(labels="permuted")
    cell = {"networks": [each.to_dict() for each in (TINY, other, permuted)], "alphas": [0.0, 1.0], "draws": 2}
    rows = alphas({**cell, "names": {"network": "mlp", "seed": 0}}, str(tmp_path))
    network, (images, labels) = TINY.at(2, tmp_path), divided(TINY).held_out
    for arm in ("own start", "trained, scaled"):
        (row,) = select(rows, arm=arm, alpha=1.0)
        score = evaluate(network, images, labels)
        assert (row["held_out_accuracy"], row["held_out_loss"]) == pytest.approx(score, abs=1e-6)
    for arm in ("fresh start", "permuted labels", "noise as displacement"):  # without a displacement all are the start
        (row,), (start,) = (select(rows, arm=each, alpha=0.0) for each in (arm, "fresh start"))
        assert row["held_out_loss"] == pytest.approx(start["held_out_loss"], rel=1e-6)
    assert [row["memorised_accuracy"] for row in rows if "memorised_accuracy" in row] != []
    mine = Trained.of(TINY, str(tmp_path))
    for alpha in (0.0, 1.0):
        (row,) = select(rows, arm="predicted", alpha=alpha)
        moments = transfer.moments(mine.displacement, mine.law, images, alpha)
        assert row["held_out_accuracy"] == moments.accuracy(labels)
    draws = [mine.at(fresh(mine, Draw.of(mine, number), 1.0)) for number in range(2)]
    (row,) = select(rows, arm="fresh start", alpha=1.0)
    losses = [evaluate(each, images, labels).loss for each in draws]
    assert row["held_out_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert losses[0] != losses[1]


def test_gaps_are_differences_of_the_accuracies_that_stand_beside_them(tmp_path):
    cell = {"networks": [TINY.to_dict()], "names": {}, "alphas": [1.0, 2.0], "draws": 4}
    row, twice = regimes(cell, str(tmp_path))
    assert row["I"] == pytest.approx(row["own"] - row["fresh"])
    assert row["R"] == pytest.approx(row["fresh"] - row["literal"])
    assert row["P"] == pytest.approx(row["fresh"] - row["predicted"])
    assert row["own"] == row["trained"]
    assert row["P_high"] - row["P"] == pytest.approx(row["fresh_high"] - row["fresh"])  # the prediction has no spread
    trained = Trained.of(TINY, str(tmp_path))
    networks = [trained.at(fresh(trained, Draw.of(trained, number), 1.0)) for number in range(4)]
    found = [evaluate(each, *divided(TINY).held_out).accuracy for each in networks]
    assert row["fresh"] == pytest.approx(sum(found) / 4)
    noised = [trained.at(literal(trained, Draw.of(trained, number), 1.0)) for number in range(4)]
    apart = mean([a - evaluate(b, *divided(TINY).held_out).accuracy for a, b in zip(found, noised)])
    assert (row["R_low"], row["R_high"]) == pytest.approx((apart.low, apart.high))  # noise and start of one draw
    images, labels = divided(TINY).held_out
    assert twice["predicted"] == transfer.moments(trained.displacement, trained.law, images, 2.0).accuracy(labels)
    cell["networks"] = [TINY.variant(network="residual_bn", width=2, learning_rate=0.05).to_dict()]
    normed, _ = regimes(cell, str(tmp_path))
    assert "P" not in normed
    trained = Trained.of(Classifier.from_dict(cell["networks"][0]), str(tmp_path))
    networks = [trained.at(fresh(trained, Draw.of(trained, number), 1.0)) for number in range(4)]
    spreads = []
    for name in norms(networks[0]):
        found = torch.cat([each.get_submodule(name).running_var for each in networks])
        spreads.append(float(found.std() / found.mean()))
    assert normed["divisors_least"] == pytest.approx(min(spreads), rel=1e-4)
    assert normed["divisors_most"] == pytest.approx(max(spreads), rel=1e-4)


def test_the_open_loop_ends_at_start_plus_displacement():
    rows = steps.steps({"network": TINY.variant(dtype="float64").to_dict(), "names": {"seed": 0}}, "")
    assert [row["rule"] for row in rows] == ["the training itself", "open loop", "closed loop", "random feedback"]
    taken = 2 * 2  # steps: the follower's sums, its differences of weights, and Delta round once each
    assert rows[1]["apart"] <= 3 * taken * 2**-53


@pytest.mark.parametrize("scaling", widths.RATES)
def test_trainings_over_the_width_do_train(scaling, monkeypatch):
    """A rate that does not fall with the width diverged in the standard scaling, and Delta was that of no training."""
    heard, train = [], widths.finite.train
    monkeypatch.setattr(widths.finite, "train", lambda *given, **more: heard.append(train(*given, **more)) or heard[-1])
    laws, goals, predict = [], [], widths.predict

    def note(moved, law, images):
        laws.append(law)
        goals.append(predict(moved, law, images))
        return goals[-1]

    monkeypatch.setattr(widths, "predict", note)
    cells = [{"depth": 2, "width": width, "scaling": scaling, "seed": 0, "run": 0} for width in (8, 96)]
    rows = [widths.widths(cell, "") for cell in cells]
    assert widths.widths(cells[0], "") == rows[0]
    assert widths.widths({**cells[0], "run": 1}, "") != rows[0]
    assert {row["arm"] for row in rows[0]} == set(widths.ARMS)
    apart = heard[0].network(widths.problem(2).inputs).detach() - goals[0]
    (own,) = select(rows[0], arm="own start")
    assert own["error"] == pytest.approx(float(apart.square().mean()))
    law_of = transfer.StartLaw.mean_field if scaling == "mean_field" else transfer.StartLaw.he
    assert laws[0].deviations == law_of(heard[0].network).deviations  # that of the starts that are drawn
    assert all(training.history[-1]["loss"] < training.history[0]["loss"] / 2 for training in heard)


def test_arms_over_the_width_are_what_their_names_say():
    """On a start of zeros a displacement whose layers are in step is the same function, one dealt apart is not."""
    problem = widths.problem(2)

    def network(seed):
        return FiniteCNN.random(problem.architecture, (6, 6), problem.inputs, seeded(seed), scaling="mean_field")

    zero = network(0)
    for parameter in zero.parameters():
        parameter.data.zero_()
    law, moved = transfer.StartLaw.mean_field(zero), transfer.Displacement.between(zero, network(1))
    wanted = network(1)(problem.inputs)
    outputs = {arm: make(moved, law, zero, seeded(2))(problem.inputs) for arm, make in widths.ARMS.items()}
    same = {arm for arm, each in outputs.items() if torch.allclose(each, wanted, rtol=1e-9, atol=1e-12)}
    assert same == {"own start", "shuffled"}
    drawn = moved.applied(law.draw(zero, seeded(2)))(problem.inputs)
    assert torch.equal(outputs["fresh start"], drawn)


@pytest.mark.slow
def test_parts_run_by_command_and_go_on_where_they_were(tmp_path):
    words = ("transfer", "--size", "quick", "--part", "regimes", "--part", "alphas", "--network", "mlp", "--width", "8")
    first = run(*words, "--jobs", "1", "--out", tmp_path / "out", "--samples", "200")
    assert first.exit_code == 0, first.stderr
    page = (tmp_path / "out" / "transfer.html").read_text()
    assert "it is what is predicted without a start in" in page
    table = (tmp_path / "out" / "regimes.csv").read_text()
    again = run(*words, "--jobs", "1", "--out", tmp_path / "out", "--samples", "200")
    total = len([line for line in again.stderr.splitlines() if "cells were there already" in line])
    assert total == 1
    assert (tmp_path / "out" / "regimes.csv").read_text() == table


def test_too_few_images_left_are_one_line(tmp_path):
    result = run("transfer", "--out", tmp_path / "out", "--quiet", "--samples", "1796")
    assert result.exit_code == 2
    remedy = "leaves 1 of 1797 images: at least one to choose by, and one held out"
    assert result.stderr == f"error: --samples=1796 {remedy}\n"
    assert not (tmp_path / "out").exists()


def test_no_seed_of_a_draw_is_that_of_a_training():
    trained = [Classifier.from_dict(cell).seed for cell in STUDY.plan(Subject(BASE), SIZES["full"])["train"]]
    assert max(trained) < 10_000
    assert arms.PREDICTED == ("mlp", "cnn")
