"""Networks to the bit, and a clear error for what is truncated, changed, foreign or does not fit."""

import json
import random

import pytest
import safetensors.torch
import torch
from hypothesis import given
from strategies import architectures, normal, random_network, seeds

import meanfield as mf
from meanfield import storage
from meanfield.storage import networks, tensors
from meanfield.storage.results import Result

ARCH = mf.Architecture((1, 4, 4), (mf.Conv(2, activation="tanh", bias=True), mf.Conv(2)), outputs=2)


@pytest.fixture
def saved(tmp_path):
    """Path of a stored network, and the network."""
    network = random_network(ARCH, (3, 2), 0)
    return mf.save_network(network, tmp_path / "net.safetensors"), network


def listed(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda path, network: mf.save_network(3, path), "network must be a ParticleNetwork, not int"),
        (lambda path, network: mf.save_network(network, None), "path=None must be the path"),
        (lambda path, network: mf.load_network(None), "path=None must be the path"),
        (lambda path, network: mf.load_network(""), "path='' must be the path"),
    ],
)
def test_wrong_arguments_are_named(saved, call, said):
    with pytest.raises((TypeError, ValueError), match=said):
        call(*saved)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @given(architectures(), seeds)
    def test_every_tensor_to_the_bit(self, tmp_path, dtype, arch, seed):
        network = random_network(arch, (3, 1, 2)[: arch.depth], seed, dtype)
        found = mf.load_network(mf.save_network(network, tmp_path / "net.safetensors"))
        assert found.architecture == arch
        assert len(found.tensors()) == len(network.tensors())
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found.tensors(), network.tensors()))
        assert [b is None for b in found.biases] == [b is None for b in network.biases]

    def test_views_and_leaves_of_a_graph_are_stored_by_value(self, tmp_path):
        network = random_network(ARCH, (3, 2), 0)
        wide = torch.cat([network.readout, network.readout], 1).requires_grad_()
        strided = mf.ParticleNetwork(ARCH, network.masses, network.kernels, wide[:, ::2], network.biases)
        found = mf.load_network(mf.save_network(strided, tmp_path / "net.safetensors"))
        assert torch.equal(found.readout, wide[:, ::2])
        assert not found.readout.requires_grad

    def test_one_file_holds_all_of_it(self, saved):
        """Tensors and description used to be two files, and could be separated."""
        path, network = saved
        assert listed(path.parent) == ["net.safetensors"]
        _, about = tensors.read(path)
        assert (about["widths"], about["dtype"], about["made"]) == ([3, 2], "float64", None)
        assert mf.Architecture.from_dict(about["architecture"]) == network.architecture

    def test_a_file_says_what_made_it(self, saved, tmp_path):
        path, network = saved
        assert networks.made_by(path) == {}
        other = mf.save_network(network, tmp_path / "other.safetensors", {"settings": {"pool": 2}})
        assert networks.made_by(other) == {"settings": {"pool": 2}}

    def test_equal_networks_are_equal_files(self, saved):
        path, network = saved
        again = mf.save_network(network, path.with_name("again.safetensors"))
        assert again.read_bytes() == path.read_bytes()

    def test_the_directory_of_a_report_holds_its_network(self, saved):
        path, network = saved
        path.rename(path.with_name("network.safetensors"))
        assert torch.equal(mf.load_network(path.parent).readout, network.readout)
        assert torch.equal(mf.load_network(str(path.parent)).readout, network.readout)

    def test_beside_a_manifest_the_network_is_that_of_the_result(self, saved):
        path, network = saved
        Result(path.parent, networks.RESULT).publish({networks.NETWORK: networks.pack(network), "report.html": "one"})
        assert torch.equal(mf.load_network(path.parent).readout, network.readout)
        mf.save_network(random_network(ARCH, (3, 2), 1), path.parent / networks.NETWORK)
        with pytest.raises(ValueError, match=r"network.safetensors does not fit solve.manifest.json beside it"):
            mf.load_network(path.parent)

    def test_tensors_alone(self, tmp_path):
        kept = {"a": normal((2, 3), 0).T, "b": torch.arange(3), "c": torch.tensor(1.5, requires_grad=True)}
        found = storage.load_tensors(storage.save_tensors(kept, tmp_path / "t.safetensors"))
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[name], kept[name]) for name in kept)
        assert found["b"].dtype == torch.int64


class TestBadFiles:
    def test_paths(self, saved):
        path, network = saved
        for call in (mf.load_network, storage.load_tensors, lambda path: mf.save_network(network, path)):
            with pytest.raises(ValueError, match=r"path='.*net.pt' must end in .safetensors"):
                call(path.with_suffix(".pt"))
        with pytest.raises(FileNotFoundError, match=r"none.safetensors does not exist"):
            mf.load_network(path.with_name("none.safetensors"))
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"net.safetensors does not exist"):
            mf.load_network(path)
        with pytest.raises(FileNotFoundError, match=r"network.safetensors"):
            mf.load_network(path.parent)

    def test_every_truncation_of_the_tensors_is_named(self, saved):
        path, _ = saved
        whole = path.read_bytes()
        for length in range(0, len(whole), 23):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"net.safetensors is not a safetensors file, perhaps truncated"):
                mf.load_network(path)

    @pytest.mark.parametrize("content", [b"hello", b"\x80\x02cos\nsystem\n", bytes(64)])
    def test_files_of_another_kind(self, saved, content):
        path, _ = saved
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"net.safetensors is not a safetensors file"):
            mf.load_network(path)

    def test_files_without_their_description_say_what_to_do(self, saved):
        """Networks of the first format, whose description lay beside them, among them."""
        path, _ = saved
        safetensors.torch.save_file(storage.load_tensors(path), path)
        path.with_suffix(".json").write_text(json.dumps({"format": "meanfield network 1"}))
        with pytest.raises(ValueError, match=r"does not say which network it holds.*run the command named in results"):
            mf.load_network(path)
        storage.save_tensors({"weight": torch.ones(3)}, path)
        with pytest.raises(ValueError, match=r"holds 'meanfield tensors 1', not 'meanfield network 2'"):
            mf.load_network(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"widths": [3, 3]}, r"its widths are said to be \[3, 3\] and are \[3, 2\]"),
            ({"dtype": "float32"}, r"its dtype are said to be 'float32' and are 'float64'"),
            ({"architecture": None}, "NoneType"),
            ({"architecture": {"layers": [1]}}, "not one written by to_dict"),
            ({"architecture": mf.Architecture((1, 4, 4), ARCH.layers[:1], outputs=2).to_dict()}, "holds the tensors"),
            (
                {"architecture": mf.Architecture((1, 4, 4), (*ARCH.layers, mf.Conv(1)), outputs=2).to_dict()},
                "kernels.2",
            ),
            ({"architecture": mf.Architecture((1, 4, 4), (mf.Conv(2),) * 2, outputs=2).to_dict()}, "biases.0"),
        ],
    )
    def test_descriptions_of_another_network_with_their_checksum(self, saved, change, message):
        path, _ = saved
        held, about = tensors.read(path)
        path.write_bytes(tensors.pack(held, about.pop("kind"), {**about, **change}))
        with pytest.raises(ValueError, match=rf"(?s)net.safetensors does not fit its description: .*{message}"):
            mf.load_network(path)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("masses.0", lambda p: -p),
            ("masses.0", lambda p: torch.ones(4, dtype=p.dtype) / 4),
            ("masses.1", lambda p: p * 1.01),
            ("kernels.1", lambda w: w * torch.nan),
            ("readout", lambda u: u.float()),
            ("readout", lambda u: u[:, :1]),
        ],
    )
    def test_tensors_of_no_network_with_their_checksum(self, saved, name, change):
        path, _ = saved
        held, about = tensors.read(path)
        path.write_bytes(tensors.pack({**held, name: change(held[name])}, about.pop("kind"), about))
        with pytest.raises(ValueError, match=r"net.safetensors does not fit its description"):
            mf.load_network(path)


def changed(content, chance):
    """A safetensors file with a valid header that was changed in one place: structure, description or entries."""
    size = int.from_bytes(content[:8], "little")
    header, entries = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    about = json.loads(header["__metadata__"]["meanfield"])
    names = sorted(set(header) - {"__metadata__"})
    one, other = chance.sample(names, 2)
    kind = chance.randrange(8)
    if kind == 0:
        header[one], header[other] = header[other], header[one]
    elif kind == 1:
        header[one]["shape"] = header[one]["shape"][::-1]
    elif kind == 2:
        header[one]["dtype"] = chance.choice(["I64", "U64", "F32", "F64"])
    elif kind == 3:
        header[f"{one}0"] = header.pop(one)
    elif kind == 4:
        entries[chance.randrange(len(entries))] ^= 1 << chance.randrange(8)
    elif kind == 5:
        del about[chance.choice(list(about))]
    else:
        _change(about, chance)
    header["__metadata__"]["meanfield"] = json.dumps(about)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(entries)


def meant(content):
    """Header, description and entries."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    return header | {"__metadata__": json.loads(header["__metadata__"]["meanfield"])}, content[8 + size :]


def _change(value, chance):
    """One leaf of nested JSON is another."""
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value[key], (dict, list)) and value[key]:
        return _change(value[key], chance)
    others = ["relu", "tanh", "softplus", "average", "flatten", "max", "none", True, False, None, 0, 1, 2, 3, -1]
    value[key] = chance.choice([other for other in others if (type(other), other) != (type(value[key]), value[key])])
    return None


def test_of_1200_changed_files_none_loads_as_another_network(tmp_path):
    """279 of 1,200 changed descriptions used to load, a softplus as tanh among them."""
    chance, path = random.Random(0), tmp_path / "net.safetensors"
    architecture = mf.Architecture((1, 4, 4), (mf.Conv(2, activation="softplus", bias=True), mf.Conv(2)), outputs=2)
    network = random_network(architecture, (3, 3), 0)
    whole, same = mf.save_network(network, path).read_bytes(), 0
    for _ in range(1200):
        content = changed(whole, chance)
        path.write_bytes(content)
        if meant(content) == meant(whole):  # such as the shape (3,) the other way round
            same += 1
            continue
        with pytest.raises(ValueError, match=r"net.safetensors"):
            mf.load_network(path)
    assert same < 200
