"""The landscape study: its cells, its command, one small real run."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import run, tiny
from strategies import random_network

import meanfield as mf
from meanfield.bench.classifiers import Classifier
from meanfield.landscape import Plane
from meanfield.studies.landscape import command, measure, plan
from meanfield.studies.landscape.command import Options, classifier, settled
from meanfield.studies.landscape.given import Given
from meanfield.studies.landscape.plan import ARMS, SIZES, Sizes, Subject, View
from meanfield.studies.landscape.study import STUDY
from meanfield.validation import Misuse

TINY = Subject(
    Classifier(network="cnn", width=2, samples=120, penalty="none", strength=0.0), View(grid=5, tolerance=0.5)
)
SMALL = Sizes(
    epochs=3,
    seeds=2,
    arms=("relu", "untrained"),
    l2=(0.01,),
    l12=(),
    evaluations=110,
    images=40,
    products=9,
    rises=3,
    steps=8,
    directions=2,
    widths=(3, 4),
    pairs=1,
    flow_steps=5,
    flow_images=8,
    source=6,
    sampled=(3, 4),
    target={"cross_entropy": 2.0, "squared": 0.4},
)


def cells(part, subject=TINY, sizes=SMALL):
    return STUDY.plan(subject, sizes, parts=[part])[part]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_the_plan_trains_what_is_measured_once_and_every_part_has_cells(size):
    found = STUDY.plan(TINY, size)
    assert list(found) == ["train", *STUDY.parts]
    trained = [Classifier.from_dict(cell) for cell in found["train"]]
    assert len(set(trained)) == len(trained)
    needed = {
        Classifier.from_dict(each) for part in STUDY.parts for cell in found[part] for each in cell.get("networks", ())
    }
    assert set(trained) == needed
    assert all(each.checkpoints == tuple(range(size.epochs + 1)) for each in trained)


def test_arms_are_what_they_say():
    found = {arm.names["arm"]: arm for arm in plan.arms(TINY, replace(SIZES["default"], l2=(0.01,), l12=(0.5,)), 3)}
    assert list(found) == [*ARMS, "l2 0.01", "l12 0.5"]
    assert {arm.classifier.seed for arm in found.values()} == {3}
    assert found["tanh"].classifier.activation == "tanh"
    assert found["residual, batch norm"].classifier.network == "residual_bn"
    assert found["squared loss"].classifier.recipe.loss == found["squared loss"].names["trained_with"] == "squared"
    assert found["permuted labels"].classifier.labels == "permuted"
    assert (found["untrained"].epoch, found["relu"].epoch) == (0, 30)
    assert (found["l12 0.5"].classifier.penalty, found["l12 0.5"].classifier.strength) == ("l12", 0.5)
    assert {name: arm.names["l2"] for name, arm in found.items() if arm.names["l2"] is not None} == {
        "relu": 0.0,
        "l2 0.01": 0.01,
    }


def test_matched_networks_are_those_that_were_trained_with_the_target_of_their_loss():
    sizes = replace(SMALL, arms=("relu", "squared loss", "untrained"))
    found = cells("matched", sizes=sizes)
    assert {(cell["names"]["arm"], cell["target"]) for cell in found} == {
        ("relu", 2.0),
        ("squared loss", 0.4),
        ("l2 0.01", 2.0),
    }
    assert len(cells("sharpness", sizes=sizes)) == len(found) + SMALL.seeds


@pytest.mark.parametrize(("kind", "count"), [("random", 1), ("eigen", 1), ("line", 2), ("triangle", 3), ("pca", 4)])
def test_planes_have_the_networks_that_they_lead_through(kind, count):
    subject = Subject(TINY.base, replace(TINY.view, plane=kind))
    found = cells("surfaces", subject)
    assert {len(cell["networks"]) for cell in found} == {count}
    assert len(found) == (2 if kind == "pca" else 3)  # a start has no path
    seeds = {each["seed"] for each in found[0]["networks"]}
    assert len(seeds) == (1 if kind in ("random", "eigen", "pca") else count)
    assert found[0]["epochs"] == ([0, 1, 2, 3] if kind == "pca" else [3] * count)


@pytest.mark.slow
def test_the_study_runs_and_goes_on_where_it_was(tmp_path):
    heard = []
    parts, listen = list(STUDY.parts), lambda part, cell, kept: heard.append(kept)
    tables = STUDY.run(TINY, SMALL, tmp_path, parts=parts, announce=listen)
    again = STUDY.run(TINY, SMALL, tmp_path, parts=parts, announce=listen)
    assert again == tables
    assert heard == [False] * (len(heard) // 2) + [True] * (len(heard) // 2)
    assert not list((tmp_path / "networks").glob("*.surface.*"))
    surfaces = {row["arm"]: row for row in tables["surfaces"]}
    assert set(surfaces) == {"relu", "untrained", "l2 0.01"}
    for row in surfaces.values():
        assert np.shape(row["values"]["train loss"]) == (5, 5)
        middle = row["values"]["train loss"][2][2]
        end = next(each for each in tables["sharpness"] if (each["arm"], each["seed"]) == (row["arm"], 0))
        assert middle == pytest.approx(end["train_loss"], abs=max(row["error"], 1e-5) * 3)
    for row in tables["matched"]:
        assert not row["reached"] or row["train_loss"] == pytest.approx(2.0, rel=1e-5)
    ends = {row["epoch"] for row in tables["trajectory"]}
    assert ends == {0, 1, 2, 3}
    mixtures = [row["barrier"] for row in tables["joins"] if row["how"] == "mixture"]
    assert mixtures
    assert max(mixtures) < 1e-12
    ratios = {row["writing"]: row for row in tables["toy"] if row["activation"] == "relu" and row["seed"] == 0}
    assert ratios["per layer"]["mean_loss"] == pytest.approx(ratios["as it is"]["mean_loss"], rel=1e-4)
    assert abs(ratios["per channel"]["mean_loss"] / ratios["as it is"]["mean_loss"] - 1) > 0.01


def test_exact_surfaces_are_the_network_s_own_losses(tmp_path):
    subject = Subject(TINY.base, View(grid=3, tolerance=None))
    (cell, *_) = cells("surfaces", subject, replace(SMALL, epochs=1, arms=("relu",), l2=()))
    (row,) = measure.surface(cell, str(tmp_path))
    assert (row["status"], row["error"], row["evaluations"], row["check_points"]) == ("exact", 0.0, 9, [])
    network, images = Classifier.from_dict(cell["networks"][0]).at(1, tmp_path), TINY.base.images()
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(network(images.inputs), images.labels)
    assert row["values"]["train loss"][1][1] == pytest.approx(float(expected), rel=1e-5)


def test_what_is_left_open_is_settled():
    found = settled(Options())
    assert (found.data, found.pool, found.samples) == ("digits", 1, 1437)
    assert settled(found) == found
    base = classifier(found)
    assert (base.network, base.width, base.penalty, base.split) == ("cnn", 16, "none", 0)
    assert found.view == View()
    assert Options(exact=True).view.tolerance is None
    assert Options(tolerance=0.1, plane="pca", grid=7).view == View(tolerance=0.1, plane="pca", grid=7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exact": True, "tolerance": 0.1}, "exact=True leaves nothing to tolerate"),
        ({"loss": "softmax"}, "loss='softmax' is of the network of --network"),
        ({"classes": (3, 5)}, r"classes=\(3, 5\) is of the network of --network"),
        ({"plane": "randon"}, "plane='randon' is unknown"),
        ({"tolerance": 0.0}, "tolerance=0.0 must be"),
        ({"grid": 1}, "grid=1 must be an integer of at least 2"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(Misuse, match=message):
        Options(**settings)


def test_the_command_runs_the_study_of_its_settings(monkeypatch):
    heard = []
    monkeypatch.setattr(command, "run_study", lambda *arguments: heard.append(arguments))
    command.command(Options(samples=100, plane="line", width=3))
    ((study, options, subject, *program),) = heard
    assert (study, program) == (STUDY, ["meanfield", "landscape"])
    assert (options.samples, subject.base.samples, subject.base.width, subject.view.plane) == (100, 100, 3, "line")


class TestNetworkOfAFile:
    @pytest.fixture
    def network(self, tmp_path):
        """Of two classes of digits at 4x4, saved as a solve saves it."""
        layer = mf.Conv(3, padding=1, activation="tanh")
        architecture = mf.Architecture((1, 4, 4), (layer, layer), outputs=1)
        settings = {"data": "digits", "classes": [3, 5], "samples": 12, "pool": 2, "split": None, "loss": "squared"}
        settings |= {"source_penalty": 1e-3, "readout_penalty": 1e-2, "input_penalty": 1e-3, "kernel_norm": "l2"}
        network = random_network(architecture, (3, 2), 0)
        return mf.save_network(network, tmp_path / "net.safetensors", {"settings": settings}), network

    @pytest.mark.slow
    def test_its_surface_has_j_at_the_network(self, network, tmp_path):
        path, particles = network
        out = tmp_path / "out"
        result = run("landscape", "--network", path, "--grid", "5", "--tolerance", "0.3", "--out", out, "--jobs", "1")
        assert result.exit_code == 0, result.stderr
        found = np.load(out / "surfaces.npz")
        digits = mf.data.load("digits", classes=(3, 5), samples=12, pool=2)
        penalty = mf.Penalty(source=1e-3, readout=1e-2, input=1e-3)
        problem = mf.Problem(particles.architecture, digits.inputs, digits.targets("squared"), "squared", penalty)
        (row,) = json.loads((out / "surfaces.json").read_text()).values()
        assert found["net/train J"][2, 2] == pytest.approx(float(problem.value(particles)), abs=3 * row["error"] + 1e-9)
        assert (out / "surfaces.nc").read_bytes()[:3] == b"CDF"
        page = (out / "landscape.html").read_text()
        assert "All figures of the surface" in page
        assert "12 images of 1 x 4 x 4" in page
        lines = [line for line in (out / "surfaces.csv").read_text().splitlines() if not line.startswith("#")]
        assert next(csv.DictReader(lines))["status"] == row["status"]
        assert (
            "1 of 1 cells were there already"
            in run(
                "landscape", "--network", path, "--grid", "5", "--tolerance", "0.3", "--out", out, "--jobs", "1"
            ).stderr
        )

    @pytest.mark.slow
    def test_a_solve_says_what_it_was_made_from(self, tmp_path):
        """What the command line left open used to be written as None: images and penalty could not be found again."""
        out = tmp_path / "solve"
        words = [each for each in tiny("--out", out) if not each.startswith(("--samples", "--readout-penalty"))]
        result = run(*words)
        assert result.exit_code == 0, result.stderr
        given = Given((str(out),), View())
        assert (len(given.images), given.loss) == (292, "squared")  # four fifths of 365
        value = json.loads((out / "results.json").read_text())["solution"]["value"]
        assert float(given.problem(given.images).value(given.networks[0])) == pytest.approx(value, rel=1e-9)
        settings = json.loads((out / "results.json").read_text())["made"]["settings"]
        assert settings["readout_penalty"] > 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--plane", "line"], "is 1 network; --plane=line takes 2"),
            (["--plane", "pca"], "--plane=pca takes at least 3"),
            (["--pool", "1"], "takes images (1, 4, 4), and --data='digits' has (1, 8, 8)"),
            (["--classes", "1,2,3"], "has 1 outputs, and 3 classes"),
            (["--exact", "--tolerance", "0.1"], "--exact leaves nothing to tolerate"),
            (["--network", "missing", "--plane", "line"], "--network='missing' must be the file of a network"),
            (["--width", "8"], "--width=8 is of networks that are trained"),
        ],
    )
    def test_what_does_not_fit_is_one_line(self, network, tmp_path, arguments, message):
        result = run("landscape", "--network", network[0], "--out", tmp_path / "out", "--quiet", *arguments)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert message in result.stderr

    def test_networks_that_span_no_plane_or_are_not_alike_are_named_as_the_option(self, network, tmp_path):
        path, drawn = network
        other = random_network(drawn.architecture, (4, 2), 1)
        other_path = mf.save_network(other, tmp_path / "other.safetensors")
        for second, message in (
            (path, "span no plane for --plane=line"),
            (other_path, "several widths, (3, 2) and (4,"),
        ):
            given = Given((str(path), str(second)), View(plane="line"))
            with pytest.raises(Misuse, match=re.escape(message)) as error:
                given.check()
            assert error.value.argument == "network"


def test_marks_of_a_plane_are_rows_of_plain_values():
    """A cell's rows travel as JSON."""
    plane = Plane({}, {}, {}, marks={"network": (0.0, 0.5)}, warnings=("x",))

    class Found:
        figures, error, status, evaluations = ("train loss",), 0.1, "met", 9.0
        least, largest = 1.0, 2.0
        checks = (torch.tensor([[0.0, 1.0]]), torch.tensor([1.0]), torch.tensor([1.5]))
        errors = {"train loss": 0.1}  # noqa: RUF012
        axis = staticmethod(lambda n: torch.linspace(-1, 1, n))
        grid = staticmethod(lambda n, figure: torch.ones(n, n))

    row = measure.drawn(Found, plane, 3)
    assert json.loads(json.dumps(row)) == row
    assert row["check_points"] == [[0.0, 1.0, 1.5]]


def test_every_network_has_directions_of_its_own():
    """Shared ones moved all networks alike, which no interval saw."""
    for part in ("sharpness", "matched"):
        chosen = cells(part, Subject(TINY.base), replace(SMALL, l2=(0.01, 0.02)))
        assert len({each["seed"] for each in chosen}) == len(chosen) > 2
    ends, same = (cells(part) for part in ("sharpness", "matched"))
    seeds = {str(each["names"]): each["seed"] for each in ends}
    assert all(seeds[str(each["names"])] == each["seed"] for each in same)  # at both times the same
