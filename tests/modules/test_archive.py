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


class Laid(nn.Module):
    """In float64: weights with the channels last, a bias within a longer tensor, kernels that are no parameters, a
    number of images that stays open.
    """

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, (3, 2)).double().to(memory_format=torch.channels_last)
        self.conv.bias = nn.Parameter(torch.randn(9).double()[5:])
        self.register_buffer("fixed", torch.randn(5, 4, 2, 2).double(), persistent=False)
        self.fc = nn.Linear(150, 3).double()

    def forward(self, x):
        x = torch.tanh(nn.functional.conv2d(torch.relu(self.conv(x)), self.fixed))
        return self.fc(x.reshape(x.size(0), -1))


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    torch.manual_seed(0)
    module, path = Laid().eval(), tmp_path_factory.mktemp("laid") / "laid.pt2"
    options = {"strict": False, "dynamic_shapes": ({0: torch.export.Dim("images", min=2)},)}
    program = torch.export.export(module, (torch.zeros(2, 2, 8, 8).double(),), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the bias, that the rest of its tensor is saved as well
        torch.export.save(program, path)
    return module, path


def test_tensors_are_read_as_they_lie_in_memory(laid):
    module, path = laid
    images = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network_of(path)(images), module(images), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b'"storage_offset": {"as_int": 5}', b'"storage_offset": {"as_int": 6}', "conv.bias is said to have 4 numbers"),
        (b'"storage_offset": {"as_int": 5}', b'"storage_offset": {"as_int": -1}', "conv.bias is said"),
        (b'{"as_int": 12}, {"as_int": 1}', b'{"as_int": 12}, {"as_int": -1}', "conv.weight is said"),
        (b'"dtype": 8', b'"dtype": 6', "in a dtype that is not float32 or float64"),
    ],
)
def test_figures_of_tensors_that_cannot_be_are_refused(laid, tmp_path, old, new, said):
    def changed(name, content):
        return content.replace(old, new, 1) if name.endswith("weights_config.json") else content

    with pytest.raises(ValueError, match=said):
        network_of(rewritten(laid[1], tmp_path / "changed.pt2", changed))


def test_a_member_that_would_fill_the_memory_is_not_read(laid, monkeypatch):
    monkeypatch.setattr(archive, "MOST_BYTES", 1000)
    with pytest.raises(Misuse, match=r"says that models/model\.json takes"):
        network_of(laid[1])


def test_a_program_of_two_tensors_is_refused(tmp_path):
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    images = torch.zeros(2, 1, 4, 4)
    torch.export.save(torch.export.export(Two(), (images, images), strict=False), tmp_path / "two.pt2")
    with pytest.raises(Misuse, match="takes 2 tensors and gives 1"):
        network_of(tmp_path / "two.pt2")


def test_a_program_that_was_taken_apart_is_refused_with_its_layer(exported, tmp_path):
    """There a batch norm gives three tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of another part of it
        apart = exported[1].run_decompositions()
    torch.export.save(apart, tmp_path / "apart.pt2")
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
