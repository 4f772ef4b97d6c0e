import numpy as np
import pytest
from image_files import grey, save


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def arrays(rng):
    return {"inputs": rng.random((6, 4, 4)), "targets": np.array([2, 7, 2, 7, 9, 9])}


@pytest.fixture
def folder(tmp_path):
    """cat: values 10, 11, 12; dog: 20, 21."""
    for name, start, count in (("dog", 20, 2), ("cat", 10, 3)):
        for index in range(count):
            save(tmp_path / "pets" / name / f"{index}.png", grey(start + index))
    return tmp_path / "pets"
