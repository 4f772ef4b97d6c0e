"""The state of a run on disk: whose it is, whether it is whole, and when it goes."""

import errno
import io
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import normal

from meanfield import storage
from meanfield.storage import files, states
from meanfield.storage.states import StateFile

SETTINGS = {"steps": 5, "widths": (4, 3), "rate": 0.1}
TENSORS = {"weight": normal((3, 2), 0), "count": torch.arange(3), "single": normal((2,), 1).float()}
FIGURES = {"value": 1 / 3, "time": math.inf, "history": [{"step": 0}]}
TREE = {**FIGURES, "network": TENSORS, "nested": [(TENSORS["weight"], None, True), {"0": TENSORS["single"]}, {}]}


@pytest.fixture
def state(tmp_path):
    found = StateFile(tmp_path / "run.safetensors", SETTINGS)
    found.save(TREE)
    return found


def test_what_is_saved_comes_back_to_the_bit(state):
    found = state.load()
    assert list(found) == list(TREE)
    assert {name: found[name] for name in FIGURES} == FIGURES
    assert all(torch.equal(found["network"][name], kept) for name, kept in TENSORS.items())
    assert [found["network"][name].dtype for name in TENSORS] == [torch.float64, torch.int64, torch.float32]
    (weight, *plain), single, empty = found["nested"]
    assert torch.equal(weight, TENSORS["weight"])
    assert plain == [None, True]
    assert torch.equal(single["0"], TENSORS["single"])
    assert empty == {}
    state.save({"weight": TENSORS["weight"] + 1, "value": 2.0})
    assert list(state.load()) == ["weight", "value"]


def test_settings_are_compared_as_json(state):
    """A tuple is a list; another value of any setting is another run, whose file stays."""
    assert StateFile(state.path, {**SETTINGS, "widths": [4, 3]}).load() is not None
    for changed in ({"steps": 6}, {"rate": 0.1 + 2**-56}, {"new": 1}):
        (name,) = changed
        with pytest.raises(ValueError, match=rf"is of another run: its {name} is .*, here .*; repeat the arguments"):
            StateFile(state.path, {**SETTINGS, **changed}).load()
    assert state.load() is not None


def test_what_differs_is_named_by_its_innermost_entry(state):
    with pytest.raises(ValueError, match=r"its widths\.1 is 3, here 5; repeat"):
        StateFile(state.path, {**SETTINGS, "widths": (4, 5)}).load()
    nested = {"penalty": {"source": 0.1, "readout": [1, {"bound": None}]}}
    StateFile(state.path, nested).save({})
    with pytest.raises(ValueError, match=r"its penalty\.readout\.1\.bound is None, here 2\.0; repeat"):
        StateFile(state.path, {"penalty": {"source": 0.1, "readout": [1, {"bound": 2.0}]}}).load()


def test_a_full_disk_costs_the_state_and_not_the_run(state, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_new", full)
    with pytest.warns(UserWarning, match=r"No space left on device: .*run\.safetensors\); the run goes on"):
        state.save({"value": 2.0})
    assert state.load()["value"] == FIGURES["value"]


def test_without_a_file_there_is_no_state(state):
    state.remove()
    assert state.load() is None
    state.remove()


def test_a_file_that_was_changed_is_refused(state):
    whole = state.path.read_bytes()
    for length in range(0, len(whole), 61):
        state.path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"run.safetensors' cannot be used: .*truncated"):
            state.load()
    for position in (len(whole) - 1, len(whole) - 40):  # entries of tensors
        state.path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ValueError, match="is damaged: its checksum does not fit; delete it to start anew"):
            state.load()
    state.path.write_bytes(whole.replace(b'\\"step\\": 0', b'\\"step\\": 1'))
    assert state.path.read_bytes() != whole
    with pytest.raises(ValueError, match="its checksum does not fit"):
        state.load()


def test_tensors_that_were_exchanged_are_refused(state):
    from safetensors import safe_open

    with safe_open(state.path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(state.path)
    name, weight = "state/network/weight", TENSORS["weight"]
    for changed in ({name: weight.T.reshape(3, 2)}, {name: weight.reshape(2, 3)}):
        save_file({**tensors, **changed}, state.path, metadata)
        with pytest.raises(ValueError, match="its checksum does not fit"):
            state.load()
    renamed = {f"{key}s" if key == name else key: tensor for key, tensor in tensors.items()}  # in the same order
    save_file(renamed, state.path, metadata)
    with pytest.raises(ValueError, match="its checksum does not fit"):
        state.load()


def test_other_files_of_tensors_and_other_formats_are_refused(state):
    """States of the first format, whose checksum lay elsewhere, among them."""
    storage.save_tensors(TENSORS, state.path)
    for _ in range(2):
        with pytest.raises(ValueError, match="is no 'meanfield state 4'; give another path, or delete it"):
            state.load()
        save_file(TENSORS, state.path, {"body": "{}", "sha256": "0"})


def test_a_file_is_opened_once(state, monkeypatch):
    """Between two openings another process may replace it: of 120 concurrent reads one was refused."""
    opened, path_open = [], io.open
    monkeypatch.setattr(io, "open", lambda *arguments, **options: opened.append(1) or path_open(*arguments, **options))
    assert state.load() is not None
    assert len(opened) == 1


def test_paths(tmp_path):
    with pytest.raises(ValueError, match=r"state='.*run.pt' must end in .safetensors"):
        StateFile(tmp_path / "run.pt", {})
    with pytest.raises(ValueError, match=r"state='.*' lies in a directory that does not exist: create .*none first"):
        StateFile(tmp_path / "none" / "run.safetensors", {})


def test_the_file_goes_unless_the_run_can_go_on(state):
    def interrupted():
        raise KeyboardInterrupt

    def failed():
        raise RuntimeError("no")

    assert states.ended(state, interrupted) == "interrupted"
    with pytest.raises(RuntimeError):
        states.ended(state, failed)
    assert state.path.exists()
    assert states.ended(state, lambda: "completed") == "completed"
    assert not state.path.exists()
    assert states.ended(None, lambda: "diverged") == "diverged"
