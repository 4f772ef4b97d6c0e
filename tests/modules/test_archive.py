"""Files of torch.export are read as data: the same network, and nothing in them is run."""

import contextlib
import json
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import meanfield as mf
from meanfield.modules import archive, chain
from meanfield.validation import Misuse

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    module = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)).eval()
    program = torch.export.export(module, (torch.zeros(1, 1, 8, 8),), strict=False)
    path = tmp_path_factory.mktemp("exported") / "module.pt2"
    torch.export.save(program, path)
    return module, program, path


def network_of(path):
    return mf.ParticleNetwork(*chain.particles(archive.of_file(path)))


def rewritten(path, to, change):
    """A copy of a zip whose members `change` (name, content) has gone over."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return to


def test_a_file_a_program_and_a_module_are_one_network(exported):
    module, program, path = exported
    ways = [mf.ParticleNetwork.from_module(module, torch.zeros(1, 1, 8, 8)), mf.ParticleNetwork.from_module(program)]
    for way in ways:
        found = network_of(path)
        assert found.architecture == way.architecture
        assert all(torch.equal(a, b) for a, b in zip(found.tensors(), way.tensors()))


def test_a_program_that_was_taken_apart_is_refused_with_its_layer(exported, tmp_path):
    """There a batch norm gives three tensors."""
    torch.export.save(exported[1].run_decompositions(), tmp_path / "apart.pt2")
    with pytest.raises(Misuse, match=r"0 \(Conv2d\).*export it without run_decompositions"):
        network_of(tmp_path / "apart.pt2")


class Evil:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


def test_code_in_a_file_is_not_run_where_torch_runs_it(exported, tmp_path):
    ran = tmp_path / "ran"
    payload = pickle.dumps(Evil(ran))
    path = rewritten(exported[2], tmp_path / "evil.pt2", lambda name, old: payload if "sample_inputs" in name else old)
    assert network_of(path).widths == (5,)
    assert not ran.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):  # whatever it makes of what the payload returns
            torch.export.load(path)
    assert ran.exists()  # the control


def test_tensors_as_pickles_are_refused(exported, tmp_path):
    def pickled(name, old):
        return old.replace(b'"use_pickle": false', b'"use_pickle": true') if "weights_config" in name else old

    with pytest.raises(Misuse, match="as a pickle, which could run code"):
        network_of(rewritten(exported[2], tmp_path / "pickled.pt2", pickled))


def test_damage_is_said(exported, tmp_path):
    (tmp_path / "none.pt2").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged, or no file of torch"):
        network_of(tmp_path / "none.pt2")
    short = rewritten(exported[2], tmp_path / "short.pt2", lambda n, old: old[:8] if n.endswith("weight_0") else old)
    with pytest.raises(ValueError, match="weight is said to have 36 numbers"):
        network_of(short)

    def other(name, old):
        return json.dumps({"graph_module": {}}).encode() if name.endswith("model.json") else old

    with pytest.raises(ValueError, match="laid out in a way that is not known"):
        network_of(rewritten(exported[2], tmp_path / "other.pt2", other))
    shutil.make_archive(str(tmp_path / "older"), "zip", exported[2].parent)
    with pytest.raises(Misuse, match="save it again by torch"):
        network_of(tmp_path / "older.zip")
