"""Tasks in sequence: what the methods are made of, choices, shared trainings, and a run that was killed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from meanfield import forgetting, fusion
from meanfield.bench.classifiers import Classifier
from meanfield.finite import fit
from meanfield.forgetting.tasks import heads_of
from meanfield.storage.states import StateFile
from meanfield.studies.transfer import tasks as part
from meanfield.studies.transfer.plan import DIVISIONS, SIZES, Subject, _divided, ended
from meanfield.studies.transfer.plan import tasks as planned
from meanfield.studies.transfer.tasks import METHODS, REDUCED, WAYS, Course, Way

TINY = ended(
    Classifier(network="cnn", width=3, penalty="none", strength=0.0, samples=100, pool=2, learning_rate=0.05), 2
)
TWO = _divided(10, 2)


def cell(method, heads="task", groups=TWO, classifier=TINY):
    return {"network": classifier.to_dict(), "groups": groups, "names": {"heads": heads, "method": method, "seed": 0}}


def row(store, *given, **more):
    (found,) = part.tasks(cell(*given, **more), str(store))
    return found


def learning(groups=TWO, classifier=TINY):
    return part._tasks(classifier, groups)[0]


def same(first, second):
    return all(torch.equal(first.state_dict()[name], each) for name, each in second.state_dict().items())


def failing_after(monkeypatch, saves):
    """A process that ends without warning once so many states were written."""
    count, save = [], StateFile.save

    def saved(self, state):
        save(self, state)
        count.append(None)
        if len(count) == saves:
            raise RuntimeError("killed")

    monkeypatch.setattr(StateFile, "save", saved)


def test_tasks_are_of_what_is_not_held_out():
    training, held_out = part._tasks(TINY, TWO)
    images = TINY.images()
    half = len(images.held_out) // 2
    assert sum(map(len, training)) == len(images.inputs) + half
    assert sum(map(len, held_out)) == len(images.held_out) - half
    assert torch.equal(held_out[1].labels, images.held_out_labels[half:][images.held_out_labels[half:] > 4])


def test_networks_of_one_task_are_fitted_within_its_head_each_from_a_start_of_its_own(tmp_path):
    course, (_, second) = Course(TINY, "task", str(tmp_path)), learning()
    assert course.start_of(0) == course.start_of(1, own=True) == TINY
    assert [course.start_of(index).seed for index in (1, 2, 3)] == [1, 10_001, 20_001]
    other = TINY.variant(seed=1)
    wanted = fit(other.start(), second.images, second.labels, other.recipe, 1, heads=heads_of([second], "task"))
    assert same(course.alone(second, course.start_of(1)), wanted.network)


@pytest.mark.parametrize("division", DIVISIONS)
def test_of_fused_networks_every_head_answers_as_the_network_it_is_from(division, tmp_path):
    classifier = TINY.variant(dtype="float64", epochs=1, checkpoints=(1,))
    course, tasks = Course(classifier, "task", str(tmp_path)), learning(_divided(10, DIVISIONS[division]), classifier)
    networks = WAYS["ensemble"].networks(course, tasks, 0.0)
    assert len(networks) == len(tasks)
    images = tasks[0].images[:9]
    for index, task in enumerate(tasks):
        own = course.alone(task, course.start_of(index))(images)[:, task.classes]
        for network in networks[max(index, 1) :]:
            torch.testing.assert_close(network(images)[:, task.classes], own, rtol=1e-12, atol=1e-12)
        later = [each for other in tasks[index + 1 :] for each in other.classes]
        if index:
            assert not networks[index](images)[:, later].any()


def test_displacements_are_added_to_the_first_tasks_network(tmp_path):
    course, tasks = Course(TINY, "task", str(tmp_path)), learning()
    for own, method in ((False, "displacement from another start"), (True, "displacement from the same start")):
        moved = WAYS[method].networks(course, tasks, 0.7)[-1]
        start = TINY if own else TINY.variant(seed=1)
        parts = (course.alone(tasks[0], TINY), course.alone(tasks[1], start), start.start(), moved)
        for first, second, begun, found in zip(*(each.parameters() for each in parts)):
            torch.testing.assert_close(found, first + 0.7 * (second - begun))


def test_the_union_is_reduced_to_one_width_on_the_images_that_it_says(tmp_path, monkeypatch):
    seen, reduce = [], fusion.reduce
    monkeypatch.setattr(fusion, "reduce", lambda *given: seen.append(len(given[2])) or reduce(*given))
    course, tasks = Course(TINY, "task", str(tmp_path)), learning()
    for method in (REDUCED, "reduced union, images of all tasks"):
        networks = WAYS[method].networks(course, tasks, 0.0)
        assert [each.shape for each in networks[0].parameters()] == [each.shape for each in networks[1].parameters()]
    assert seen == [len(tasks[1]), len(tasks[0]) + len(tasks[1])]


def test_the_line_goes_from_the_first_tasks_network_to_the_last(tmp_path):
    course, (_, held_out) = Course(TINY, "task", str(tmp_path)), part._tasks(TINY, TWO)
    first = course.alone(learning()[0], TINY)
    for method in (REDUCED, "average"):
        found = row(tmp_path, method)
        for index in (0, 1):
            line = found[f"line_{index + 1}"]
            assert len(line) == part.POINTS
            assert line[0] == forgetting.score(first, held_out)[index].accuracy
            assert line[-1] == found[f"accuracy_{index + 1}"]
        assert found["accuracy"] == pytest.approx((found["accuracy_1"] + found["accuracy_2"]) / 2)
        assert found["forgetting"] == pytest.approx(found["line_1"][0] - found["accuracy_1"])
    assert row(tmp_path, "ensemble")["line_1"] == []


def test_strengths_are_chosen_without_the_held_out_images(tmp_path, monkeypatch):
    monkeypatch.setitem(WAYS, "L2-SP", Way(WAYS["L2-SP"].networks, (0.01, 1.0)))
    found, divided = row(tmp_path, "L2-SP"), part.divided

    def strange(classifier):
        division = divided(classifier)
        images, labels = division.held_out
        return division._replace(held_out=(images, labels.roll(1)))

    monkeypatch.setattr(part, "divided", strange)
    other = row(tmp_path, "L2-SP")
    for name in ("chosen", "strengths", "validation_accuracies", "validation_losses"):
        assert other[name] == found[name]
    assert other["accuracy"] != found["accuracy"]
    best = max(found["validation_accuracies"])
    assert found["validation_accuracies"][found["strengths"].index(found["chosen"])] == best


def test_a_strength_that_diverges_loses_and_one_that_has_no_rival_is_said_to(tmp_path, monkeypatch):
    networks = WAYS["L2-SP"].networks
    monkeypatch.setitem(WAYS, "L2-SP", Way(networks, (0.01, 1e30)))
    found = row(tmp_path, "L2-SP")
    assert (found["chosen"], found["status"]) == (0.01, "completed")
    monkeypatch.setitem(WAYS, "L2-SP", Way(networks, (1e30,)))
    found = row(tmp_path, "L2-SP")
    assert found["status"] == "diverged"
    assert found["loss"] == pytest.approx(torch.tensor(5.0).log())  # five outputs that are all 0


@pytest.mark.slow
@pytest.mark.parametrize("saves", [1, 3, 5])
def test_a_killed_run_goes_on_to_the_same_bits(saves, tmp_path, monkeypatch):
    monkeypatch.setitem(WAYS, "EWC", Way(WAYS["EWC"].networks, (1.0, 10.0)))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with monkeypatch.context() as patched:
        failing_after(patched, saves)
        with pytest.raises(RuntimeError, match="killed"):
            row(killed, "EWC")
    with warnings.catch_warnings(action="error"):
        assert row(killed, "EWC") == row(whole, "EWC")
    files = {path.name for path in whole.iterdir()}
    assert {path.name for path in killed.iterdir()} == files
    assert all((killed / name).read_bytes() == (whole / name).read_bytes() for name in files)


def test_what_methods_share_is_trained_once(tmp_path, monkeypatch):
    count, learn = [], forgetting.learn
    monkeypatch.setattr(
        forgetting, "learn", lambda *given, **more: count.append(len(given[1])) or learn(*given, **more)
    )
    for method in ("fine-tuning", "replay", "average", "ensemble", REDUCED):
        row(tmp_path, method)
    assert sorted(count) == [1, 1, 2, 2]  # A, B from another start; fine-tuning and replay go on from A
    row(tmp_path, "replay")
    assert len(count) == 4


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["task", "one"])
@pytest.mark.filterwarnings("error")
def test_every_method_takes_five_tasks(heads, tmp_path, monkeypatch):
    classifier = TINY.variant(epochs=1, checkpoints=(1,))
    for method, way in list(WAYS.items()):
        monkeypatch.setitem(WAYS, method, Way(way.networks, way.strengths[::4]))  # the last one blows up
        found = row(tmp_path, method, heads, _divided(10, 5), classifier)
        accuracies = [found[f"accuracy_{index}"] for index in range(1, 6)]
        assert found["accuracy"] == pytest.approx(sum(accuracies) / 5)
        assert found["status"] == "completed"
        assert found["line_1"] == []
        assert (found["chosen"] is None) == (not way.strengths)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["displacement from another start", "average", "ensemble", REDUCED])
def test_batch_norm_takes_part(method, tmp_path):
    classifier = TINY.variant(network="residual_bn", width=2, epochs=1, checkpoints=(1,))
    found = row(tmp_path, method, classifier=classifier)
    assert found["status"] == "completed"
    assert len(found["line_1"]) == (0 if method == "ensemble" else part.POINTS)


def test_a_cell_is_a_method():
    cells = planned(Subject(TINY), SIZES["full"], 0)
    assert len(cells) == 2 * 2 * 10 * len(METHODS)
    first = [each["names"]["method"] for each in cells[: len(METHODS)]]
    assert first == list(METHODS)
    assert {each["network"]["learning_rate"] for each in cells} == {0.05}


def test_the_readout_is_found_by_name(tmp_path):
    for network in ("mlp", "cnn", "residual"):
        course = Course(TINY.variant(network=network), "task", str(tmp_path))
        layer = TINY.variant(network=network).start().get_submodule(course.readout)
        assert isinstance(layer, nn.Linear)
        assert layer.out_features == 10
