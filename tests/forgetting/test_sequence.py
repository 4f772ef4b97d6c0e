"""Sequences of tasks: heads, readouts of other sizes, resuming, scores, choices."""

import copy
import math

import pytest
import torch
from strategies import normal, seeded
from torch import nn

from meanfield import limits
from meanfield.finite import Recipe, cnn, fit, residual
from meanfield.forgetting import (
    EWC,
    FineTuning,
    LwF,
    Replay,
    Scores,
    Task,
    choose,
    divided,
    held_apart,
    learn,
    narrowed,
    score,
    widened,
)
from meanfield.forgetting.tasks import memory
from meanfield.validation import Misuse

GROUPS = ((0, 3, 1), (4, 2))
RECIPE = Recipe(epochs=3, batch_size=8, learning_rate=0.05, milestones=(2,))


def start(outputs=5, dtype=torch.float64, seed=0):
    return cnn((1, 4, 4), outputs, width=2, generator=seeded(seed), dtype=dtype)


def tasks(groups=GROUPS, dtype=torch.float64):
    images = torch.rand((40, 1, 4, 4), generator=seeded(3), dtype=torch.float64).to(dtype)
    return divided(images, torch.arange(40) % 5, groups)


def same_bits(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TestTasks:
    def test_divided_by_classes(self):
        first, second = tasks()
        assert (first.classes, len(first), second.classes, len(second)) == ((0, 3, 1), 24, (4, 2), 16)
        assert set(second.labels.tolist()) == {2, 4}
        assert len(tasks(((4, 1),))[0]) == 16
        with pytest.raises(Misuse, match="no class twice"):
            tasks(((0, 1), (1, 2)))
        with pytest.raises(Misuse, match=r"groups=\(7, 8\) is a group of classes without an image"):
            tasks(((0, 1), (7, 8)))
        with pytest.raises(Misuse, match="must hold every class among the labels; 2 is missing"):
            Task(second.images, second.labels, (4,))

    def test_validation_images_are_apart_and_of_every_class(self):
        whole = tasks()
        training, validation = held_apart(whole, 0.25, seed=1)
        for all_of, some, rest in zip(whole, training, validation):
            keys = [{each.numpy().tobytes() for each in task.images} for task in (all_of, some, rest)]
            assert keys[1] | keys[2] == keys[0]
            assert not keys[1] & keys[2]
            assert rest.labels.bincount()[list(rest.classes)].tolist() == [2] * len(rest.classes)
        again, other = (held_apart(whole, 0.25, seed)[1][0].images for seed in (1, 2))
        assert torch.equal(again, validation[0].images)
        assert not torch.equal(other, validation[0].images)

    def test_a_small_share_is_an_image_of_every_class(self):
        for task in held_apart(tasks(), 0.01)[1]:
            assert task.labels.bincount()[list(task.classes)].tolist() == [1] * len(task.classes)

    def test_a_memory_is_even_over_classes(self):
        first, _ = tasks()
        assert memory(first, 8).labels.bincount().tolist() == [3, 2, 0, 3]  # 3 before 1 in this task
        assert len(memory(first, 1000)) == 24


class TestReadouts:
    def test_heads_per_task_are_networks_of_their_own_readouts(self):
        """A task of two classes trained within its head of a network of five outputs, and in a network of two."""
        second = tasks()[1]
        whole = fit(start(), second.images, second.labels, RECIPE, heads=GROUPS).network
        own = fit(narrowed(start(), "linear1", (4, 2)), second.images, (second.labels == 2).long(), RECIPE).network
        for name, tensor in narrowed(whole, "linear1", (4, 2)).state_dict().items():
            torch.testing.assert_close(tensor, own.state_dict()[name], rtol=1e-9, atol=1e-12)
        assert torch.equal(whole.linear1.weight[[0, 3, 1]], start().linear1.weight[[0, 3, 1]])
        torch.testing.assert_close(
            score(widened(own, "linear1", (4, 2), 5), tasks())[1], score(whole, tasks())[1], rtol=1e-9, atol=1e-9
        )

    def test_a_readout_that_is_held_stays_held(self):
        network = start()
        network.linear1.weight.requires_grad_(False)
        for found in (narrowed(network, "linear1", (0, 2)), widened(network, "linear1", range(5), 7)):
            assert not found.linear1.weight.requires_grad
            assert found.linear1.bias.requires_grad

    def test_a_network_of_fewer_classes_is_widened_by_name(self):
        before, images = torch.get_rng_state(), tasks()[0].images
        network = start(2).train()
        wide = widened(network, "linear1", (3, 1), 5)
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(wide(images)[:, [3, 1]], network(images))
        assert not bool(wide(images)[:, [0, 2, 4]].any())
        torch.testing.assert_close(narrowed(wide, "linear1", (3, 1))(images), network(images))
        assert network.linear1.out_features == 2
        nested = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False)))
        assert narrowed(nested, "0.1", (2,))(images.float()).shape == (24, 1)
        assert [parameter.shape for parameter in narrowed(nested[0][1], "", (2, 0)).parameters()] == [(2, 16)]

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: narrowed(start(), "fc", (0,)), "readout='fc' must name the last linear layer"),
            (lambda: Task(torch.ones(2, 1, 4, 4), torch.ones(2), (1,)), r"labels=torch\.float32 must be torch\.int64"),
            (lambda: score(start(), tasks()[0]), "tasks must be a Sequence, not Task"),  # pyright: ignore
            (lambda: narrowed(start(), "linear1", (0, 5)), r"must be different outputs among 0\.\.4"),
            (lambda: widened(start(), "linear1", (0, 1), 7), "one class for each of the 5 outputs"),
        ],
    )
    def test_misuse(self, call, message):
        with pytest.raises(Misuse, match=message):
            call()


class Killed(Exception):
    pass


class TestLearning:
    def run(self, path=None, at=None, error=Killed, seen=None, **changed):
        def stop(record):
            place = (record["task"], record["epoch"])
            if seen is not None:
                seen.append(place)
            if place == at:
                raise error

        network = residual((1, 4, 4), 5, width=2, generator=seeded())
        settings = {"method": EWC(2.0), "recipe": RECIPE, "seed": 4, **changed}
        return learn(network, tasks(((0, 1), (2, 3), (4,)), torch.float32), state=path, callback=stop, **settings)

    @pytest.mark.parametrize(
        ("at", "first"),
        [
            pytest.param((0, 2), (0, 3), marks=pytest.mark.slow),
            pytest.param((1, 1), (1, 2), marks=pytest.mark.slow),
            # a last epoch is not written by itself: it is repeated from the one before, or its task is done
            ((1, 3), (1, 3)),
            pytest.param((2, 2), (2, 3), marks=pytest.mark.slow),
        ],
    )
    def test_a_killed_run_goes_on_where_it_was_to_the_same_bits(self, tmp_path, at, first):
        path, places = tmp_path / "run.safetensors", []
        with pytest.raises(Killed):
            self.run(path, at)
        found, whole = self.run(path, seen=places), self.run()
        assert places[0] == first
        assert (found.status, len(found.networks)) == ("completed", 3)
        assert all(same_bits(*pair) for pair in zip(found.networks, whole.networks))
        assert not list(tmp_path.iterdir())

    def test_an_interrupt_keeps_the_tasks_that_were_learnt(self, tmp_path):
        path = tmp_path / "run.safetensors"
        found = self.run(path, (1, 2), KeyboardInterrupt)
        assert (found.status, len(found.networks)) == ("interrupted", 1)
        assert found.message.startswith("1 of 3 tasks: 2 of 3 epochs")
        assert path.exists()

    def test_a_time_limit_ends_it_with_a_status(self):
        with limits.within(0):
            found = self.run()
        assert (found.status, found.networks) == ("max_seconds", ())

    @pytest.mark.parametrize(
        ("changed", "name"),
        [({"method": EWC(3.0)}, "strength"), ({"method": FineTuning()}, "method"), ({"heads": "one"}, "heads")],
    )
    def test_the_state_of_another_run_is_refused(self, tmp_path, changed, name):
        path = tmp_path / "run.safetensors"
        with pytest.raises(Killed):
            self.run(path, (1, 2))
        with pytest.raises(Misuse, match=f"its {name}"):
            self.run(path, **changed)

    def test_the_tasks_that_were_learnt_are_those_of_a_seed(self, tmp_path):
        """The training in progress, which has a file of its own, may not have one yet."""
        path = tmp_path / "run.safetensors"
        with pytest.raises(Killed):
            self.run(path, (1, 1))
        path.with_suffix(".task1.safetensors").unlink()
        with pytest.raises(Misuse, match="its seed"):
            self.run(path, seed=5)

    def test_networks_that_are_there_are_not_trained_again(self):
        whole = self.run()
        tail = self.run(begun=whole.networks[:1], at=(0, 1))  # the first task would be a kill
        assert all(same_bits(*pair) for pair in zip(tail.networks, whole.networks))

    def test_the_caller_keeps_what_is_theirs(self):
        network, images = residual((1, 4, 4), 5, width=2, generator=seeded()).train(), tasks(dtype=torch.float32)
        before, numbers = copy.deepcopy(network.state_dict()), torch.get_rng_state()
        for method in (EWC(1.0), LwF(1.0), Replay(2)):
            learn(network, images, method, RECIPE)
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
        assert torch.equal(torch.get_rng_state(), numbers)
        assert all(module.training for module in network.modules())
        assert all(each.requires_grad and each.grad is None for each in network.parameters())

    def test_networks_take_the_dtype_of_the_images_and_the_callers_keeps_its_own(self):
        network = start(dtype=torch.float32)
        found = learn(network, tasks(), FineTuning(), RECIPE)
        assert next(network.parameters()).dtype == torch.float32
        assert next(found.network.parameters()).dtype == torch.float64

    def test_one_head_competes_with_every_class(self):
        """Under heads per task the rows of the other task stay; under one head they are pushed down."""
        first, other = tasks()
        per_task, one = (learn(start(), (first, other), FineTuning(), RECIPE, heads=heads) for heads in ("task", "one"))
        rows = [each.networks[0].linear1.weight[[4, 2]] for each in (per_task, one)]
        assert torch.equal(rows[0], start().linear1.weight[[4, 2]])
        assert not torch.equal(rows[1], rows[0])

    def test_a_divergence_says_so(self):
        found = learn(start(), tasks(), FineTuning(), Recipe(epochs=3, learning_rate=1e200, warm_up=0))
        assert (found.status, found.networks) == ("diverged", ())
        with pytest.raises(Misuse, match="networks='diverged' is how the first task ended"):
            _ = found.network


class Fixed(nn.Module):
    """Says the same of every image."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = nn.Parameter(torch.tensor(outputs, dtype=torch.float64))

    def forward(self, images):
        return self.outputs.expand(len(images), -1)


class TestScores:
    def test_by_hand(self):
        """Eight images a class. Within their heads the first says 0 and 2, the second 1 and 2; with one head 0, 1."""
        networks = Fixed(3.0, 2.0, 1.0, 0.0, 0.5), Fixed(0.0, 4.0, 2.0, 1.0, 0.5)
        found = Scores.of(networks, tasks(), "task")
        torch.testing.assert_close(found.accuracies, torch.tensor([[1 / 3, 1 / 2], [1 / 3, 1 / 2]]).double())
        assert Scores.of(networks, tasks(), "one").accuracies.tolist() == [[1 / 3, 0], [1 / 3, 0]]
        logs = [torch.tensor(v).double().log_softmax(0).mean() for v in ((0.0, 4.0, 1.0), (2.0, 0.5))]
        assert found.losses[1].tolist() == pytest.approx([-float(each) for each in logs])
        assert found.loss == pytest.approx(-float(sum(logs)) / 2)

    def test_the_mean_is_of_the_last_and_forgetting_from_the_best_before(self):
        table = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.7, 0.3], [0.5, 0.9, 1.0]], dtype=torch.float64)
        found = Scores(table, table)
        assert found.mean == pytest.approx(0.8)
        assert found.forgetting == pytest.approx(((0.9 - 0.5) + (0.7 - 0.9)) / 2)
        assert math.isnan(Scores(table[:1], table[:1]).forgetting)


class TestChoice:
    def test_the_best_on_images_that_training_never_saw(self):
        seen = []

        def train(right, given):
            seen.extend(given)
            return Fixed(*right)

        candidates = [(2.0, 0.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 3.0, 1.0)]
        found = choose(candidates, train, tasks(), heads="one", share=0.25)
        assert [len(task) for task in seen] == [18, 12] * 3
        assert found.accuracies == (1 / 6, 1 / 6, 1 / 6)  # a third of one task, nothing of the other
        assert found.best == min(zip(found.losses, candidates))[1]

    def test_it_is_judged_by_no_image_that_it_trained_on(self):
        """One that knows its training images by heart, against one that knows the classes a little."""

        class Heart(nn.Module):
            def __init__(self, given):
                super().__init__()
                self.known = torch.cat([task.images.flatten(1) for task in given])
                self.labels = torch.cat([task.labels for task in given])

            def forward(self, images):
                same = (images.flatten(1)[:, None] == self.known).all(2)
                label = torch.where(same.any(1), self.labels[same.double().argmax(1)], 1)
                return nn.functional.one_hot(label, 5).double()

        found = choose(
            [True, False], lambda heart, given: Heart(given) if heart else Fixed(0.1, 0, 0, 0.2, 0.1), tasks()
        )
        assert found.best is False

    def test_accuracy_comes_first(self):
        """A class of two for sure, right on half of one task, against a class of three with a small loss."""
        candidates = [(0.1, 0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0, 90.0)]
        for given in (candidates, candidates[::-1]):
            found = choose(given, lambda c, _: Fixed(*c), tasks(), heads="one")
            assert found.best == candidates[1]
        assert sorted(found.accuracies) == [1 / 6, 1 / 4]
        assert found.losses[0] > found.losses[1]

    def test_of_equal_accuracies_the_least_loss(self):
        candidates = [(0.0, 0.0, 0.1, 0.0, 0.0), (0.1, 0.0, 90.0, 0.0, 0.0)]
        found = choose(candidates, lambda c, _: Fixed(*c), tasks(((0, 1), (2, 4))))
        assert found.best == candidates[0]
        assert found.losses[0] < found.losses[1]
        worse = [(0.0, 0.0, 0.0, 0.0, 0.1), (0.1, 0.0, 90.0, 0.0, 0.0)]  # all alike in accuracy by symmetry
        assert choose(worse, lambda c, _: Fixed(*c), tasks(((0, 1), (2, 4)))).best == worse[0]

    def test_misuse(self):
        with pytest.raises(Misuse, match=r"candidates=.* must be at least one"):
            choose([], lambda c, _: c, tasks())
        with pytest.raises(Misuse, match=r"share=1\.0 must be less than 1"):
            choose([1], lambda c, _: c, tasks(), share=1)
        with pytest.raises(Misuse, match="has a class of one image"):
            held_apart([Task(normal((1, 1, 4, 4), 0), torch.zeros(1, dtype=torch.int64), (0,))])
