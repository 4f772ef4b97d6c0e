"""Training by a recipe: steps, augmentation, resuming to the bit, every ending with a status."""

import copy
import itertools
import math
from typing import ClassVar

import pytest
import torch
from strategies import normal, seeded
from torch import nn
from torch.nn import functional

from meanfield import data, limits
from meanfield.finite import (
    Recipe,
    evaluate,
    fit,
    fitting,
    l12,
    residual,
    vgg,
)
from meanfield.validation import Misuse


def small(dropout=0.0, dtype=torch.float32, seed=0):
    return vgg(8, (1, 4, 4), 3, width=2, hidden=(6,), dropout=dropout, generator=seeded(seed), dtype=dtype)


def task(count=22, dtype=torch.float32):
    return torch.rand((count, 1, 4, 4), generator=seeded(3), dtype=torch.float64).to(dtype), torch.arange(count) % 3


def linear(outputs=3, dtype=torch.float64):
    """A classifier whose gradients can be written down."""
    network = vgg(8, (1, 4, 4), outputs, width=1, generator=seeded(), dtype=dtype)
    plain = nn.Sequential(nn.Flatten(), copy.deepcopy(network.linear1))
    plain[1].weight = nn.Parameter(normal((outputs, 16), 0, dtype))
    return plain


def digits(pool=1):
    """(inputs, labels) of 300 images of four classes, and of 200 others."""
    found = data.load("digits", classes=(0, 1, 2, 3), samples=300, pool=pool)
    return [(part.inputs.float(), part.indices) for part in found.split(200)]


def recipe(**settings):
    return Recipe(**{"epochs": 5, "batch_size": 8, "learning_rate": 0.02, "milestones": (3,), **settings})


def same_bits(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def comparable(history):
    return [{name: figure for name, figure in record.items() if name != "seconds"} for record in history]


class TestSteps:
    @pytest.mark.parametrize(
        ("penalty", "strength", "loss"),
        [
            ("none", 0.0, "cross_entropy"),
            ("l12", 0.7, "cross_entropy"),
            ("l2", 0.3, "cross_entropy"),
            ("l2", 0.3, "squared"),
        ],
    )
    def test_three_whole_batch_steps_are_nesterov_steps_on_the_objective(self, penalty, strength, loss):
        """v <- momentum v + g, w <- w - rate (g + momentum v)  (torch's form of Sutskever et al. 2013), at the rate of
        each step.
        """
        (inputs, labels), network = task(dtype=torch.float64), linear()
        found = recipe(
            epochs=3,
            batch_size=100,
            penalty=penalty,
            strength=strength,
            warm_up=2,
            milestones=(2,),
            momentum=0.8,
            loss=loss,
        )
        weight, bias = (p.detach().clone() for p in network.parameters())
        velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for rate in (0.01, 0.02, 0.004):
            output = inputs.flatten(1) @ weight.T + bias
            said = output if loss == "squared" else output.softmax(1)
            residue = (said - functional.one_hot(labels, 3)) / len(labels)
            means = weight.abs().mean(0)
            extra = {"none": 0 * weight, "l12": 2 * means * weight.sign() / 3, "l2": weight}[penalty]
            gradients = [residue.T @ inputs.flatten(1) + strength * extra, residue.sum(0)]
            velocity = [0.8 * v + g for v, g in zip(velocity, gradients)]
            weight, bias = (w - rate * (g + 0.8 * v) for w, g, v in zip((weight, bias), gradients, velocity))
        trained = list(fit(network, inputs, labels, found).network.parameters())
        torch.testing.assert_close(trained[0].detach(), weight, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(trained[1].detach(), bias, rtol=1e-11, atol=1e-13)

    def test_the_records(self):
        """At a rate too small to move anything the pass sees the start: its mean weighs the short last batch by its
        size.
        """
        (inputs, labels), network = task(dtype=torch.float64), linear()
        seen = []
        found = recipe(learning_rate=1e-13, epochs=2, milestones=(1,), penalty="l12", strength=1)
        result = fit(network, inputs, labels, found, callback=seen.append)
        accuracy, loss = evaluate(network, inputs, labels)
        assert seen == result.history
        assert [list(record) for record in seen] == [
            ["epoch", "loss", "regulariser", "accuracy", "learning_rate", "seconds"]
        ] * 2
        for record, rate in zip(seen, (1e-13, 0.2e-13)):
            assert record["loss"] == pytest.approx(loss, rel=1e-9)
            assert record["accuracy"] == accuracy
            assert record["regulariser"] == pytest.approx(float(l12(network[1].weight.detach())), rel=1e-9)
            assert record["learning_rate"] == pytest.approx(rate, rel=1e-12)
        assert ([record["epoch"] for record in seen], result.epochs, result.status) == ([1, 2], 2, "completed")
        assert 0 < seen[0]["seconds"] < seen[1]["seconds"] <= result.seconds
        assert result.message == "2 of 2 epochs: all epochs were taken"

    def test_every_epoch_visits_every_image_once_in_another_order(self):
        seen = []

        class Watch(nn.Flatten):
            def forward(self, input):
                seen.extend([input[:, 0, 0, 0].tolist()] if self.training else [])
                return super().forward(input)

        inputs, labels = task(count=21, dtype=torch.float64)
        inputs[:, 0, 0, 0] = torch.arange(21)
        fit(nn.Sequential(Watch(), linear()[1]), inputs, labels, recipe(epochs=2))
        assert [len(batch) for batch in seen] == [8, 8, 5] * 2
        first, second = (list(itertools.chain(*batches)) for batches in (seen[:3], seen[3:]))
        assert sorted(first) == sorted(second) == list(range(21))
        assert first != second
        assert first != sorted(first)

    def test_the_seed_decides_and_nothing_else_moves(self):
        (inputs, labels), network = task(), small(dropout=0.5).eval()
        before, start = torch.get_rng_state(), copy.deepcopy(network.state_dict())
        first, other = (fit(network, inputs, labels, recipe(epochs=2), seed) for seed in (1, 2))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(7)  # the global numbers have no say in dropout
        again = fit(network, inputs, labels, recipe(epochs=2), 1)
        assert same_bits(first.network, again.network)
        assert not same_bits(first.network, other.network)
        assert all(torch.equal(start[name], tensor) for name, tensor in network.state_dict().items())
        assert not network.training
        assert not first.network.training
        assert all(p.grad is None for p in [*network.parameters(), *first.network.parameters()])

    def test_parameters_without_gradient_stay(self):
        inputs, labels = task()
        network = small()
        network.conv1.weight.requires_grad_(False)
        trained = fit(network, inputs, labels, recipe(epochs=1)).network
        assert torch.equal(trained.conv1.weight, network.conv1.weight)
        assert not torch.equal(trained.conv2.weight, network.conv2.weight)

    def test_dtype_is_that_of_the_inputs(self):
        inputs, labels = task(dtype=torch.float64)
        result = fit(small(), inputs, labels, recipe(epochs=1))
        assert {p.dtype for p in result.network.parameters()} == {torch.float64}
        assert math.isfinite(result.history[0]["loss"])

    @pytest.mark.parametrize(("batch_norm", "bound"), [(True, 0.3), (False, 0.8)])
    def test_digits_are_learnt_by_a_residual_network(self, batch_norm, bound):
        train, test = digits(pool=2)
        network = residual((1, 4, 4), 4, width=4, batch_norm=batch_norm, generator=seeded())
        result = fit(network, *train, recipe(epochs=6, batch_size=16, learning_rate=0.05, milestones=(5,)))
        assert evaluate(network, *test).loss > 1.2
        assert evaluate(result.network, *test).loss < bound
        first, last = (net.get_submodule("stage3.0").conv2.weight for net in (network, result.network))
        assert not torch.equal(first, last)

    @pytest.mark.parametrize("settings", [{}, {"penalty": "l12", "strength": 1}])
    def test_digits_are_learnt(self, settings):
        train, test = digits()
        network = vgg(8, (1, 8, 8), 4, width=8, generator=seeded())
        result = fit(network, *train, recipe(epochs=8, batch_size=16, milestones=(6,), **settings))
        assert evaluate(network, *test).accuracy < 0.5
        assert evaluate(result.network, *test).accuracy > 0.93


class Pull:
    """A term with the gradient 3 in every entry of the last weight."""

    settings: ClassVar = {"kind": "pull"}

    def __init__(self):
        self.seen = []

    def __call__(self, network, batch):
        self.seen.append([len(each) for each in batch])
        torch.testing.assert_close(network(batch.images), batch.outputs)
        return 3 * network[1].weight.sum()


class TestHeadsTermsAndParts:
    GROUPS = ((2, 0), (1,))

    @pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
    def test_a_loss_within_heads_is_that_of_their_own_columns(self, loss):
        """One whole-batch step, of an image of class 0 or 2 among these, of class 1 with nothing beside it."""
        (inputs, labels), network = task(dtype=torch.float64), linear()
        found = recipe(epochs=1, batch_size=100, loss=loss, momentum=0.0, warm_up=0)
        result = fit(network, inputs, labels, found, heads=self.GROUPS)
        weight, x = network[1].weight.detach(), inputs.flatten(1)
        output, gradient = x @ weight.T + network[1].bias.detach(), torch.zeros(22, 3, dtype=torch.float64)
        pair = labels != 1
        shares = output[:, [0, 2]].softmax(1) if loss == "cross_entropy" else output[:, [0, 2]]
        targets = functional.one_hot(labels, 3).double()
        gradient[:, [0, 2]] = (shares - targets[:, [0, 2]]) * pair[:, None]
        if loss == "squared":
            gradient[:, 1] = (output[:, 1] - 1) * ~pair
            assert result.history[0]["loss"] == pytest.approx(float(gradient.square().sum()) / 2 / 22)
        torch.testing.assert_close(result.network[1].weight.detach(), weight - 0.02 * gradient.T @ x / 22)
        hits = output[:, [0, 2]].argmax(1) == labels // 2
        expected = float((hits & pair).sum() + (~pair).sum()) / 22
        assert (
            result.history[0]["accuracy"] == evaluate(network, inputs, labels, heads=self.GROUPS).accuracy == expected
        )
        assert expected > evaluate(network, inputs, labels).accuracy

    def test_terms_are_added_to_every_step_and_see_its_batch(self):
        (inputs, labels), network, pull = task(dtype=torch.float64), linear(), Pull()
        plain, pulled = (
            fit(network, inputs, labels, recipe(epochs=1, batch_size=22, momentum=0.0, warm_up=0), terms=terms)
            for terms in ((), (pull,))
        )
        torch.testing.assert_close(pulled.network[1].weight, plain.network[1].weight - 0.02 * 3)
        assert pulled.history[0]["loss"] == plain.history[0]["loss"]
        assert pull.seen == [[22, 22, 22]]

    def test_what_is_not_trained_stays_with_its_statistics(self):
        inputs, labels = task(dtype=torch.float64)
        network = residual((1, 4, 4), 3, width=2, generator=seeded(), dtype=torch.float64)
        network.conv1.weight.requires_grad_(False)
        result = fit(network, inputs, labels, recipe(epochs=1), trained=("stage3", "linear1"))
        before, after = network.state_dict(), result.network.state_dict()
        moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"stage3", "linear1"}
        assert not torch.equal(before["stage3.0.norm1.running_mean"], after["stage3.0.norm1.running_mean"])
        same = zip(network.parameters(), result.network.parameters())
        assert all(one.requires_grad == other.requires_grad for one, other in same)
        assert not any(module.training for module in result.network.modules())

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"heads": ((0, 1), (1, 2))}, "no class twice"),
            ({"heads": ((0, 1),)}, "must hold every class among the labels; 2 is in none of them"),
            ({"heads": ((0, 1), (2, 3))}, r"must name outputs of the network, which are 0\.\.2"),
            ({"heads": (0, 1)}, "heads=0 must be a group of classes"),
            ({"trained": "linear1"}, "trained='linear1' must be a sequence of names of modules: conv1, "),
            ({"trained": ("fc",)}, r"trained=\('fc',\) must be a sequence of names of modules"),
        ],
    )
    def test_misuse(self, changed, message):
        with pytest.raises(Misuse, match=message):
            fit(small(), *task(), recipe(), **changed)


class TestAugmentation:
    def test_every_image_is_a_shifted_and_perhaps_mirrored_copy(self):
        """Rows and columns are read off one image of distinct entries; all places and both orientations occur equally
        often.
        """
        height, width, count = 16, 24, 3000
        image = torch.arange(1.0, 1 + 2 * height * width).reshape(1, 2, height, width)
        found = fitting.augmented(image.expand(count, -1, -1, -1), seeded())
        padded = functional.pad(image, (3, 3, 2, 2))
        views = {
            (top, left): padded[0, :, top : top + height, left : left + width] for top in range(5) for left in range(7)
        }
        keys = {view.contiguous().numpy().tobytes(): (*place, 0) for place, view in views.items()}
        keys |= {view.flip(2).contiguous().numpy().tobytes(): (*place, 1) for place, view in views.items()}
        places = torch.tensor([keys[one.numpy().tobytes()] for one in found]).double()
        assert places.mean(0).tolist() == pytest.approx([2, 3, 0.5], abs=0.15)
        assert len(places.unique(dim=0)) == 70
        assert bool((places.T.corrcoef() - torch.eye(3)).abs().max() < 0.1)

    def test_images_of_less_than_eight_pixels_are_only_mirrored(self):
        image = normal((1, 1, 7, 7), 0)
        found = fitting.augmented(image.expand(40, -1, -1, -1), seeded())
        assert {bool(torch.equal(one, image[0])) for one in found} == {True, False}
        assert all(torch.equal(one, image[0]) or torch.equal(one, image[0].flip(2)) for one in found)

    def test_a_recipe_uses_it(self):
        inputs, labels = task()
        plain, moved = (
            fit(small(), inputs, labels, recipe(epochs=1, augment=augment)).history[0]["loss"]
            for augment in (False, True)
        )
        assert plain != moved


class Killed(Exception):
    pass


class TestCheckpointsAndResuming:
    SETTINGS = (
        {"augment": True, "penalty": "l12", "strength": 0.5},
        {"momentum": 0.0},
        {"penalty": "l2", "strength": 0.1},
    )

    def run(self, path=None, at=None, error=Killed, **settings):
        def stop(record):
            if record["epoch"] == at:
                raise error

        inputs, labels = task()
        start, seed, kept = (
            settings.pop("start", None) or small(dropout=0.4),
            settings.pop("seed", 5),
            settings.pop("checkpoints", (0, 2, 4)),
        )
        added = {name: settings.pop(name) for name in ("heads", "terms", "trained") if name in settings}
        kept = {"checkpoints": kept, **added}
        return fit(start, inputs, labels, recipe(**settings), seed, state=path, callback=stop, **kept)

    @pytest.mark.parametrize("settings", SETTINGS)
    @pytest.mark.parametrize("at", [1, 3])
    def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(self, tmp_path, settings, at):
        path = tmp_path / "run.safetensors"
        with pytest.raises(Killed):
            self.run(path, at, **settings)
        torch.rand(3)
        with pytest.raises(Killed):
            self.run(path, at + 1, **settings)
        resumed, whole = self.run(path, **settings), self.run(**settings)
        assert same_bits(resumed.network, whole.network)
        assert comparable(resumed.history) == comparable(whole.history)
        assert [record["epoch"] for record in whole.history] == [1, 2, 3, 4, 5]
        assert list(resumed.checkpoints) == [0, 2, 4]
        assert all(same_bits(resumed.at(epoch), whole.at(epoch)) for epoch in (0, 2, 4))
        assert [record["seconds"] for record in resumed.history] == sorted(
            record["seconds"] for record in resumed.history
        )
        assert not list(tmp_path.iterdir())

    def test_batch_statistics_are_resumed_too(self, tmp_path):
        start = residual((1, 4, 4), 3, width=2, generator=seeded())
        with pytest.raises(Killed):
            self.run(tmp_path / "run.safetensors", 2, start=start)
        assert same_bits(self.run(tmp_path / "run.safetensors", start=start).network, self.run(start=start).network)

    def test_a_checkpoint_is_the_network_of_a_run_that_ends_there(self):
        whole = self.run(checkpoints=(0, 2, 5))
        assert same_bits(whole.at(0), small(dropout=0.4))
        assert same_bits(whole.at(2), self.run(epochs=2, checkpoints=()).network)
        assert same_bits(whole.at(5), whole.network)
        assert not whole.at(2).training
        with torch.no_grad():
            whole.at(2).conv1.weight.zero_()
        assert whole.at(2).conv1.weight.any()
        with pytest.raises(ValueError, match=r"epoch=3 was not kept: choose one of \[0, 2, 5\]"):
            whole.at(3)

    def test_an_interrupt_keeps_the_last_whole_epoch_and_the_file(self, tmp_path):
        path = tmp_path / "run.safetensors"
        result = self.run(path, 3, KeyboardInterrupt)
        assert (result.status, result.epochs, len(result.history)) == ("interrupted", 3, 3)
        assert result.message.startswith("3 of 5 epochs: stopped by the user")
        assert same_bits(result.network, self.run(epochs=3, checkpoints=()).network)
        assert self.run(path).status == "completed"

    def test_an_interrupt_within_an_epoch(self):
        steps = []

        class Stop(nn.Flatten):
            def forward(self, input):
                steps.append(self.training)
                if sum(steps) == 5:
                    raise KeyboardInterrupt
                return super().forward(input)

        inputs, labels = task(dtype=torch.float64)
        before = torch.get_rng_state()
        result = fit(nn.Sequential(Stop(), linear()[1]), inputs, labels, recipe())
        assert torch.equal(torch.get_rng_state(), before)
        assert (result.status, result.epochs) == ("interrupted", 1)
        assert torch.equal(result.network[1].weight, fit(linear(), inputs, labels, recipe(epochs=1)).network[1].weight)

    def test_a_time_limit_keeps_the_last_whole_epoch_and_the_file(self, tmp_path):
        with limits.within(0):
            result = self.run(tmp_path / "run.safetensors")
        assert (result.status, result.epochs) == ("max_seconds", 0)
        assert result.message.startswith("0 of 5 epochs: stopped at the time limit")

    def test_divergence_has_a_status_and_keeps_the_last_whole_epoch(self, tmp_path):
        inputs, labels = task()
        result = fit(
            small(),
            inputs,
            labels,
            recipe(learning_rate=1e6, warm_up=0),
            checkpoints=(0, 5),
            state=tmp_path / "run.safetensors",
        )
        assert result.status == "diverged"
        assert "lower learning_rate" in result.message
        assert result.epochs == len(result.history) < 5
        assert list(result.checkpoints) == [0]
        assert all(bool(p.isfinite().all()) for p in result.network.parameters())
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("changed", "name"),
        [
            ({"epochs": 6}, "epochs"),
            ({"learning_rate": 0.03}, "learning_rate"),
            ({"seed": 6}, "seed"),
            ({"checkpoints": (0, 2)}, "checkpoints"),
            ({"start": small(dropout=0.4, seed=1)}, "start"),
            ({"start": small(dropout=0.3)}, "network"),
            ({"heads": ((0, 1), (2,))}, "heads"),
            ({"terms": (Pull(),)}, "terms"),
            ({"trained": ("linear1",)}, "frozen"),
        ],
    )
    def test_the_file_of_another_run_is_refused_and_kept(self, tmp_path, changed, name):
        path = tmp_path / "run.safetensors"
        with pytest.raises(Killed):
            self.run(path, 2)
        before = path.read_bytes()
        with pytest.raises(ValueError, match=f"is of another run: its {name} is .*, here .*; repeat the arguments"):
            self.run(path, **changed)
        assert path.read_bytes() == before


class TestEvaluate:
    def test_score_and_modes(self):
        inputs, labels = task()
        network = small(dropout=0.5).train()
        network.conv2.eval()
        modes = [module.training for module in network.modules()]
        with torch.no_grad():
            output = copy.deepcopy(network).eval()(inputs)
        score = evaluate(network, inputs, labels, batch_size=5)
        assert [module.training for module in network.modules()] == modes
        logs = output.double().log_softmax(1)
        assert score.loss == pytest.approx(
            -sum(float(row[label]) for row, label in zip(logs, labels.tolist())) / 22, rel=1e-5
        )
        assert score.accuracy == sum(int(row.argmax()) == label for row, label in zip(logs, labels.tolist())) / 22
        assert 0 < score.accuracy < 1
        squared = evaluate(network, inputs, labels, batch_size=5, loss="squared")
        assert squared.accuracy == score.accuracy
        assert squared.loss == pytest.approx(
            float((output - functional.one_hot(labels, 3)).double().square().sum()) / 44, rel=1e-5
        )

    def test_modes_are_put_back_after_an_error(self):
        network = small().train()
        with pytest.raises(RuntimeError):
            evaluate(network, torch.zeros(2, 5, 4, 4), torch.tensor([0, 1]))
        assert all(module.training for module in network.modules())


class TestArguments:
    @pytest.mark.parametrize(
        ("changed", "error", "message"),
        [
            ({"network": "vgg"}, TypeError, "network must be a torch.nn.Module, not str"),
            ({"recipe": {"epochs": 3}}, TypeError, "recipe must be a Recipe, not dict"),
            ({"inputs": [1.0]}, TypeError, r"inputs must be a torch.Tensor .*, not list"),
            (
                {"inputs": torch.zeros(22, 1, 4, 4, dtype=torch.int64)},
                ValueError,
                "inputs has dtype torch.int64 and shape",
            ),
            ({"labels": torch.zeros(21, dtype=torch.int64)}, ValueError, r"labels has shape \(21,\); expected \(22,\)"),
            ({"labels": torch.zeros(22)}, ValueError, "labels has dtype torch.float32; expected torch.int64"),
            (
                {"labels": torch.full((22,), 3)},
                ValueError,
                r"labels reach from 3 to 3; the network has 3 outputs, so they must lie in 0\.\.2",
            ),
            ({"labels": torch.arange(22) % 3 - 1}, ValueError, "labels reach from -1 to 1"),
            (
                {"network": small()[:2]},
                ValueError,
                r"network gives an output of shape \(1, 2, 4, 4\) for one image; expected \(1, classes\)",
            ),
            ({"network": small().requires_grad_(False)}, ValueError, "network has no parameter that needs a gradient"),
            (
                {"inputs": torch.zeros(22, 16), "recipe": recipe(augment=True)},
                ValueError,
                r"augment=True needs inputs of shape \(N, C, H, W\)",
            ),
            ({"seed": -1}, ValueError, "seed=-1 must be an integer of at least 0"),
            ({"checkpoints": (3, 1)}, ValueError, r"checkpoints=\(3, 1\) must be increasing epochs"),
            ({"checkpoints": (6,)}, ValueError, r"checkpoints=\(6,\) go beyond the 5 epochs"),
            ({"state": "run.pt"}, ValueError, r"state='run.pt' must end in .safetensors"),
        ],
    )
    def test_fit(self, changed, error, message):
        inputs, labels = task()
        with pytest.raises(error, match=message):
            fit(**{"network": small(), "inputs": inputs, "labels": labels, "recipe": recipe(), **changed})

    def test_evaluate(self):
        inputs, labels = task(dtype=torch.float64)
        with pytest.raises(
            ValueError, match=r"inputs are torch.float64 on cpu, the network is torch.float32 on cpu; convert"
        ):
            evaluate(small(), inputs, labels)
        with pytest.raises(ValueError, match="batch_size=0 must be an integer of at least 1"):
            evaluate(small(), inputs.float(), labels, batch_size=0)
