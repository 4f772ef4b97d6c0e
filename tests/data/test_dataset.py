"""Data sets: exact selections, targets for every loss, and a clear error for every bad argument."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import meanfield as mf
from meanfield import data


class TestDigits:
    def test_the_case_with_known_figures(self):
        """First 12 images of 3 and 5 in file order, /16, 2x2 average pooling by hand."""
        source = load_digits()
        keep = np.flatnonzero(np.isin(source.target, (3, 5)))[:12]
        blocks = (source.images[keep] / 16).reshape(12, 4, 2, 4, 2).mean((2, 4))
        found = data.load("digits", classes=(3, 5), samples=12, pool=2)
        assert found.inputs.shape == (12, 1, 4, 4)
        assert found.inputs.dtype == torch.float64
        assert found.labels.dtype == torch.int64
        np.testing.assert_allclose(found.inputs[:, 0].numpy(), blocks, rtol=0, atol=1e-15)
        np.testing.assert_array_equal(found.labels.numpy(), source.target[keep])
        np.testing.assert_array_equal(found.targets("squared").numpy(), np.where(source.target[keep] == 3, 1.0, -1.0))

    def test_whole_set(self):
        found = data.load("digits")
        assert len(found) == 1797
        assert found.input_shape == (1, 8, 8)
        assert found.classes == tuple(range(10))
        assert (float(found.inputs.min()), float(found.inputs.max())) == (0.0, 1.0)

    def test_split_holds_out_the_rest_in_order(self):
        train, test = data.load("digits", classes=(3, 5), samples=12).split()
        whole = data.load("digits", classes=(3, 5))
        assert (len(train), len(test), len(whole)) == (12, 353, 365)
        assert torch.equal(torch.cat([train.inputs, test.inputs]), whole.inputs)
        assert torch.equal(torch.cat([train.labels, test.labels]), whole.labels)
        assert len(data.load("digits", classes=(3, 5), samples=12).split(held_out=40)[1]) == 40

    def test_seed_draws_a_repeatable_random_selection(self):
        first, again, other = (data.load("digits", classes=(3, 5), samples=20, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(first.inputs, again.inputs)
        assert not torch.equal(first.inputs, other.inputs)
        assert not torch.equal(first.inputs, data.load("digits", classes=(3, 5), samples=20).inputs)
        total = data.load("digits", classes=(3, 5)).inputs.sum()
        torch.testing.assert_close(first.inputs.sum() + first.rest.inputs.sum(), total)

    def test_the_problem_takes_what_load_returns(self):
        for loss in ("squared", "logistic", "softmax"):
            for classes in ((3, 5), (0, 4, 7)):
                found = data.load("digits", classes=classes, samples=12, pool=2)
                arch = mf.Architecture(found.input_shape, (mf.Conv(3),), outputs=found.outputs_for(loss))
                assert len(mf.Problem(arch, found.inputs, found.targets(loss), loss=loss).targets) == 12


class TestTargets:
    def found(self, classes):
        return data.Dataset("mine", torch.zeros(4, 1, 2, 2), torch.tensor([5, 3, 8, 3]), classes)

    def test_first_named_class_is_plus_one(self):
        found = data.Dataset("mine", torch.zeros(3, 1, 2, 2), torch.tensor([5, 3, 3]), (5, 3))
        assert found.targets("squared").tolist() == [1, -1, -1]
        assert found.targets("logistic").tolist() == [1, -1, -1]
        assert found.targets("softmax").tolist() == [0, 1, 1]
        assert [found.outputs_for(loss) for loss in ("squared", "logistic", "softmax")] == [1, 1, 2]

    def test_more_classes_in_the_named_order(self):
        found = self.found((8, 3, 5))
        own = [[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 1, 0]]
        assert found.targets("squared").tolist() == own
        assert found.targets("logistic").tolist() == [[2 * entry - 1 for entry in row] for row in own]
        assert found.targets("softmax").tolist() == [2, 1, 0, 1]
        assert [found.outputs_for(loss) for loss in ("squared", "logistic", "softmax")] == [3, 3, 3]

    def test_unknown_loss(self):
        with pytest.raises(ValueError, match="did you mean 'softmax'"):
            self.found((8, 3, 5)).targets("sofmax")


class TestBadArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"classes": (3, 11)}, r"contains 11, not a class of digits, which has 0, 1, 2, 3"),
            ({"classes": (3,)}, r"classes=\(3,\) is one class only of digits"),
            ({"classes": 3}, r"classes=3 must be a sequence of integers such as \(3, 5\)"),
            ({"classes": ()}, r"classes=\(\) must be a sequence of integers"),
            ({"classes": "35"}, "classes='35' must be a sequence of integers"),
            ({"classes": (3, 5.0)}, "must be a sequence of integers"),
            ({"classes": (3, 3)}, "names a class twice"),
            (
                {"classes": (3, 5), "samples": 366},
                "samples=366 is more than there are: digits has 365 images of the classes 3, 5",
            ),
            ({"samples": 0}, "samples=0 must be an integer of at least 1"),
            ({"classes": (3, 5), "samples": 1}, r"samples=1 takes images of one class only \(3\)"),
            ({"pool": 3}, r"pool=3 does not divide images of 8 x 8 pixels; choose one of \[1, 2, 4, 8\]"),
            ({"pool": 0}, "pool=0 must be an integer of at least 1"),
            ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
        ],
    )
    def test_selection(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            data.load("digits", **arguments)

    def test_unknown_name_suggests_the_nearest(self):
        with pytest.raises(
            ValueError, match=r"data='digist' is unknown.*'FILE.npz', 'DIRECTORY'; did you mean 'digits'\?"
        ):
            data.load("digist")

    @pytest.mark.parametrize("held_out", [354, None])
    def test_more_held_out_than_left(self, held_out):
        samples = 12 if held_out else None
        message = (
            "held_out=354 cannot be held out: 12 images are selected and 353 are left"
            if held_out
            else "365 images are selected and 0 are left"
        )
        with pytest.raises(ValueError, match=message):
            data.load("digits", classes=(3, 5), samples=samples).split(held_out)
