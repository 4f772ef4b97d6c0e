import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from meanfield import data, limits, solve, starts
from meanfield.bench.provenance import Provenance
from meanfield.bench.task import Task
from meanfield.pages import html
from meanfield.solvers import alternating
from meanfield.studies.solve import measure, page, pictures, run, sibling
from meanfield.studies.solve.command import Options
from meanfield.studies.solve.run import Run

TASK = Task(classes=(0, 1, 2), samples=9, pool=2, loss="softmax", pooling="average", readout="flatten")


@pytest.fixture(scope="module")
def solved():
    images = TASK.images()
    problem = TASK.problem(images)
    start = starts.draw(problem, (6, 4), torch.Generator().manual_seed(0), "low_rank")
    solution = alternating.solve(problem, start, rounds=1, flow_steps=20)
    made = {**vars(Provenance("meanfield solve", {"data": "digits", "tolerance": 1e-4}))}
    return Run(problem, *images.split(6), start, solution, made, 0)


@pytest.fixture(scope="module")
def results(solved):
    patch = pytest.MonkeyPatch()
    patch.setattr(run, "REFERENCE_LIMIT", 100)
    for name, value in {"ROUNDS": 1, "FLOW_STEPS": 10, "WIDTHS": (6, 4), "IMAGES": 6}.items():
        patch.setattr(sibling, name, value)
    patch.setattr(measure, "TRAINED_WIDTHS", ())
    patch.setattr(measure, "SAMPLED_WIDTHS", (4,))
    patch.setattr(measure, "PEER_STEPS", 20)
    assert not solved.is_small
    said = []
    found = measure.gather(replace(solved, pair=(2, 0), segment_steps=5), said.append)
    patch.undo()
    return found


def test_what_needs_a_small_program_is_measured_of_one_with_other_images(results):
    small = results["small"]
    assert not {"reference", "finite", "segment"} & set(results)
    assert (small["classes"], small["images"], small["shape"]) == (["2", "0"], 6, [1, 4, 4])
    assert abs(small["reference"]["difference"]) < 1e-6
    assert small["reference"]["our_value"] == pytest.approx(small["solution"]["value"])
    assert small["segment"]["midpoint_violation"]["program"] <= 1e-12


def test_the_page_says_which_sections_are_about_the_small_program(results):
    text = html.render(page.page(results), defaultdict(str))
    titles = [line[4:-5] for line in text.splitlines() if line.startswith("<h2>")]
    second = titles.index("The second part: a small program")
    assert all(title.startswith("Small program: ") for title in titles[second + 1 : -1])
    assert "Small program: cvxpy beside ours" in titles
    assert "6 of the training images, 2 against 0, averaged down to 4 × 4 pixels" in text
    assert set(pictures.pictures(results)) == {*pictures.NAMES} - {"proof"}


def test_the_finite_peer_has_the_same_layers_and_objective(results, solved):
    peer = results["peer"]
    assert peer["widths"] == list(solved.start.widths)
    assert peer["value"] < float(solved.problem.value(solved.start))
    assert peer["held_out"]["count"] == results["predictions"]["held_out"]["count"] == 6
    text = html.render(page.page(results), defaultdict(str))
    assert f"<td>{peer['held_out']['accuracy']:.2%}</td>" in text


def test_a_peer_that_ends_early_says_so(results):
    told = {**results["peer"], "status": "diverged", "message": "J = 1 after 3 steps: the objective left all bounds"}
    text = html.render(page.page({**results, "peer": told}), defaultdict(str))
    assert "ended early:</strong> J = 1 after 3 steps: the objective left all bounds" in text


def test_a_small_program_without_time_is_a_sentence(solved, monkeypatch):
    """Images in several blocks used to end the whole report where its time had passed."""
    monkeypatch.setattr(run, "REFERENCE_LIMIT", 100)
    monkeypatch.setattr(limits, "BLOCK_BYTES", 1)
    with limits.within(-1.0):
        found = measure.gather(solved)
    assert found["small"] == {"skipped": measure.NO_TIME}
    assert f"It was not solved: {measure.NO_TIME}." in html.render(page.page(found), defaultdict(str))
    assert set(pictures.pictures(found)) == {*pictures.ANSWER, *pictures.PARTICLES} - {"proof"}


def test_networks_that_there_was_time_for_are_reported(solved, monkeypatch):
    """Time that passed between two blocks of images of a network used to end the whole report."""
    monkeypatch.setattr(limits, "BLOCK_BYTES", 1)
    moments = iter([*[0.0] * 3, *[2.0] * 100])  # the limit is set, the first network is begun, its first block is done

    class Stepping(limits.Clock):
        def now(self):
            return next(moments)

    with limits.timed(Stepping()), limits.within(1.0):
        assert measure._sampled(solved) == {}


def test_accuracy_and_confusion_are_those_of_the_network_whatever_the_block(solved, monkeypatch):
    whole = measure.predictions(solved)
    monkeypatch.setattr(limits, "BLOCK_BYTES", 1)
    assert measure.predictions(solved) == whole
    output = solved.solution.network(solved.held_out.inputs)
    confusion = np.zeros((3, 3), int)
    for true, guess in zip(solved.held_out.indices.tolist(), output.argmax(1).tolist()):
        confusion[true, guess] += 1
    assert whole["held_out"]["confusion"] == confusion.tolist()
    assert whole["held_out"]["accuracy"] == confusion.trace() / confusion.sum()


def test_mistakes_are_shown_first_and_the_worst_of_them_before_the_others():
    images = replace(data.load("digits", classes=(0, 1, 2), samples=6), rest=None)
    judged = {
        "class_index": [0, 1, 2, 0, 1, 2],
        "predicted": [0, 2, 2, 1, 1, 2],
        "shown": [3.0, -0.5, 1.0, -2.0, 0.1, 4.0],
    }
    shown = measure._shown(images, judged)
    assert shown["shown"] == [-2.0, -0.5, 0.1, 1.0, 3.0, 4.0]
    assert shown["mistakes"] == 2
    assert shown["pixels"][0] == images.inputs[3, 0].tolist()


@pytest.mark.parametrize(("loss", "label"), [("squared", "output F (above 0: 3)"), ("softmax", "margin: true class")])
def test_two_classes_have_margins_where_they_have_two_outputs(loss, label):
    """The margin of softmax used to be called F, and zero for every image of the class named first."""
    task = Task(samples=4, loss=loss)
    problem, images = task.problem(), task.images()
    solution = solve(problem, (3, 2), rounds=1, flow_steps=2)
    judged = measure.predictions(Run(problem, replace(images, rest=None), None, solution.network, solution, {}, 0))
    assert pictures.output_label(judged).startswith(label)
    right = np.array(judged["training"]["class_index"]) == np.array(judged["training"]["predicted"])
    if loss == "softmax":
        assert (right == (np.array(judged["training"]["shown"]) > 0)).all()


@pytest.mark.parametrize(
    ("sides", "expected"), [((8, 8), (4, 4)), ((28, 28), (4, 4)), ((29, 31), (4, 4)), ((3, 9), (3, 4))]
)
def test_images_of_any_size_are_averaged_down(sides, expected):
    images = replace(data.load("digits", classes=(3, 5, 8), samples=60), rest=None)
    wide = replace(images, inputs=torch.rand(60, 3, *sides, dtype=torch.float64))
    small = sibling.reduced(wide, (2, 0))
    assert small.input_shape == (3, *expected)
    assert (small.classes, len(small)) == ((8, 3), sibling.IMAGES)
    chosen = torch.isin(images.labels, torch.tensor([8, 3])).nonzero().flatten()[: sibling.IMAGES]
    assert (small.labels == images.labels[chosen]).all()
    torch.testing.assert_close(small.inputs.mean((1, 2, 3))[0], wide.inputs[chosen[0]].mean(), atol=0.1, rtol=0)


def test_images_averaged_by_whole_windows_are_those_of_pool():
    images, pooled = data.load("digits", samples=100), data.load("digits", classes=(3, 5), samples=16, pool=2)
    small = sibling.reduced(images, (3, 5))
    assert (small.labels == pooled.labels).all()
    torch.testing.assert_close(small.inputs, pooled.inputs)


def test_both_classes_are_there_where_they_lie_apart():
    images = replace(data.load("digits", classes=(3, 5), samples=80), rest=None)
    order = images.labels.argsort()
    apart = replace(images, inputs=images.inputs[order], labels=images.labels[order])
    assert sibling.reduced(apart, (0, 1)).indices.bincount().tolist() == [sibling.IMAGES // 2] * 2


def test_the_pair_is_the_one_that_is_confused_most():
    confusion = np.array([[9, 0, 2], [1, 9, 2], [0, 2, 9]])
    assert sibling.most_confused(confusion, [0, 1, 2]) == (1, 2)
    assert sibling.most_confused(confusion, [0, 2]) == (0, 2)  # nothing is trained on that has no image
    assert sibling.most_confused(np.diag([3, 4, 5]), [1, 2]) == (1, 2)


@pytest.mark.parametrize("depth", [1, 2])
def test_what_cvxpy_would_see_is_counted_in_constraints_and_in_readout_features(depth):
    problem = replace(TASK, depth=depth).problem()
    widths = (6, 4)[:depth]
    positions = math.prod(problem.architecture.geometry[-1].pooled)
    readout = 9 * 3 * widths[-1] * positions
    assert run.entries(problem, widths) == max(readout, 6 * 4 * 9 * 2 * 2 if depth == 2 else 0)


def test_what_the_options_leave_open_follows_the_images():
    """Samples: 1,000 or four fifths; readout penalty: 5e-4 over the square of a flattened readout's positions."""
    few, many = (Options(classes=classes) for classes in ((3, 5), None))
    assert len(few.images()) == 4 * 365 // 5
    assert len(many.images()) == 1000
    task = many.task(many.images())
    assert task.readout_penalty == 5e-4 / 4**2  # two poolings of 8x8 pixels leave 2x2
    assert many.variant(readout="average").task(many.images()).readout_penalty == 5e-4
    assert many.variant(readout_penalty=1e-3, samples=7).task(many.images()).readout_penalty == 1e-3
