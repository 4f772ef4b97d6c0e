"""Files of a store: named by what decides them, and what becomes of damaged ones."""

import pytest
import torch

from meanfield.bench.stored import Stored
from meanfield.storage.states import StateFile
from meanfield.validation import Misuse

KEPT = {"weight": torch.arange(3.0)}


def test_a_file_is_found_by_all_that_decides_it(tmp_path):
    stored = Stored(tmp_path, "kind", {"seed": 1, "classes": (0, 1)})
    assert stored.read() is None
    stored.write(KEPT)
    assert torch.equal(Stored(tmp_path, "kind", {"classes": [0, 1], "seed": 1}).read()["weight"], KEPT["weight"])
    assert Stored(tmp_path, "kind", {"seed": 2, "classes": (0, 1)}).read() is None
    with pytest.warns(UserWarning, match="holds another network than its name says; it is trained anew"):
        assert Stored(tmp_path, "other kind", stored.named).read() is None


def test_a_damaged_state_is_removed_with_those_beside_it(tmp_path):
    stored = Stored(tmp_path / "store", "kind", {"seed": 1})

    def train(state):
        inner = state.with_suffix(".task1.safetensors")
        found = StateFile(inner, {}).load()
        inner.write_bytes(b"no state")
        return found

    assert stored.resumed(train) is None
    with pytest.warns(UserWarning, match="trained anew"):
        assert stored.resumed(train) is None

    stored.write(KEPT)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [stored.path.name]

    def refuse(state):
        raise Misuse("tasks", 0, "must be at least one")

    with pytest.raises(Misuse, match="at least one"):
        stored.resumed(refuse)
