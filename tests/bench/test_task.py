import json

import numpy as np
import pytest

import meanfield as mf
from meanfield.bench.task import BOUNDS, Task


def test_the_default_task_is_the_demonstration():
    problem = Task().problem()
    assert problem.inputs.shape == (16, 1, 4, 4)
    assert problem.architecture.depth == 2
    assert problem.penalty == mf.Penalty(source=3e-4, readout=3e-3, input=3e-4)
    assert set(problem.targets.flatten().tolist()) == {-1.0, 1.0}


def test_a_task_travels_as_json():
    task = Task(classes=(1, 7, 4), loss="softmax", depth=1, amplitude_bound=2.0)
    back = Task.from_dict({**json.loads(json.dumps(task.to_dict())), "width": 8})
    assert back == task
    assert hash(back) == hash(task)


def test_bounded_sets_both_bounds():
    assert not Task(activation="relu").bounded().problem().missing_bounds()
    assert Task().bounded().amplitude_bound == BOUNDS


def test_the_digest_follows_the_images(tmp_path):
    images, labels = np.full((4, 2, 2), 0.5), np.array([0, 1, 0, 1])
    path = tmp_path / "images.npz"
    task = Task(data=str(path), classes=None, samples=4, pool=1)
    np.savez(path, inputs=images, targets=labels)
    first = task.digest()
    images[0, 0, 0] = 1
    np.savez(path, inputs=images, targets=labels)
    assert task.digest() != first


@pytest.mark.parametrize("pixel", [(0, 0, 1), (3, 1, 1)], ids=["inside a window", "held out"])
def test_the_digest_follows_what_the_task_itself_does_not_see(pixel, tmp_path):
    """A study takes images that its task holds out, and at other sizes."""
    path = tmp_path / "images.npz"
    task = Task(data=str(path), classes=None, samples=2, pool=2)
    digests = set()
    for place in ((0, 0, 0), pixel):
        images = np.full((4, 2, 2), 0.5)
        images[place] = 1
        np.savez(path, inputs=images, targets=np.array([0, 1, 0, 1]))
        digests.add(task.digest())
    assert len(digests) == 2


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype='half'"):
        Task(dtype="half")
