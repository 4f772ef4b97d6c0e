"""Files: whole or not at all, networks to the bit, and a clear error for what is truncated, foreign or does not fit."""

import json
import os

import pytest
import torch
from hypothesis import given
from strategies import architectures, normal, random_network, seeds

import meanfield as mf
from meanfield import storage

ARCH = mf.Architecture((1, 4, 4), (mf.Conv(2, activation="tanh", bias=True), mf.Conv(2)), outputs=2)


@pytest.fixture
def saved(tmp_path):
    """Path of a stored network, and the network."""
    network = random_network(ARCH, (3, 2), 0)
    return mf.save_network(network, tmp_path / "net.safetensors"), network


def listed(directory):
    return sorted(path.name for path in directory.iterdir())


class TestWriteAtomically:
    @pytest.mark.parametrize(("content", "expected"), [(b"\x00\xff", b"\x00\xff"), ("na\u00efve", b"na\xc3\xafve")])
    def test_bytes_and_text(self, tmp_path, content, expected):
        assert storage.write_atomically(tmp_path / "a.b", content) == tmp_path / "a.b"
        assert storage.write_atomically(str(tmp_path / "a.b"), content) == tmp_path / "a.b"
        assert (tmp_path / "a.b").read_bytes() == expected
        assert listed(tmp_path) == ["a.b"]

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch, step):
        path = storage.write_atomically(tmp_path / "a", "old")

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr(os, step, fail)
        with pytest.raises(OSError, match="disk full"):
            storage.write_atomically(path, "new")
        assert path.read_text() == "old"
        assert listed(tmp_path) == ["a"]

    def test_readers_see_the_old_file_until_the_new_one_is_whole_and_on_the_disk(self, tmp_path, monkeypatch):
        path, seen, sync = storage.write_atomically(tmp_path / "a", "old"), [], os.fsync

        def look(file):
            seen.append(path.read_text())
            assert sorted(each.read_text() for each in tmp_path.iterdir()) == ["new", "old"]
            sync(file)

        monkeypatch.setattr(os, "fsync", look)
        storage.write_atomically(path, "new")
        assert seen == ["old"]
        assert path.read_text() == "new"

    def test_two_writers_do_not_share_a_temporary_file(self, tmp_path, monkeypatch):
        path, sync = tmp_path / "a", os.fsync

        def another(file):
            monkeypatch.setattr(os, "fsync", sync)
            storage.write_atomically(path, "theirs")

        monkeypatch.setattr(os, "fsync", another)
        storage.write_atomically(path, "ours")
        assert path.read_text() == "ours"
        assert listed(tmp_path) == ["a"]

    def test_contents_of_another_kind_leave_nothing(self, tmp_path):
        with pytest.raises(TypeError):
            storage.write_atomically(tmp_path / "a", 3)
        with pytest.raises(FileNotFoundError):
            storage.write_atomically(tmp_path / "none" / "a", "text")
        assert listed(tmp_path) == []


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

    def test_the_description_says_what_lies_beside_it(self, saved):
        path, network = saved
        assert path.name == "net.safetensors"
        assert listed(path.parent) == ["net.json", "net.safetensors"]
        found = json.loads(path.with_suffix(".json").read_text())
        assert (found["tensors"], found["widths"], found["dtype"]) == ("net.safetensors", [3, 2], "float64")
        assert mf.Architecture.from_dict(found["architecture"]) == network.architecture

    def test_the_directory_of_a_report_holds_its_network(self, saved):
        path, network = saved
        for suffix in (".safetensors", ".json"):
            path.with_suffix(suffix).rename(path.with_name(f"network{suffix}"))
        assert torch.equal(mf.load_network(path.parent).readout, network.readout)
        assert torch.equal(mf.load_network(str(path.parent)).readout, network.readout)

    def test_tensors_alone(self, tmp_path):
        tensors = {"a": normal((2, 3), 0).T, "b": torch.arange(3), "c": torch.tensor(1.5, requires_grad=True)}
        found = storage.load_tensors(storage.save_tensors(tensors, tmp_path / "t.safetensors"))
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert found["b"].dtype == torch.int64

    def test_without_a_description_there_is_no_network(self, tmp_path, monkeypatch):
        """It is written last: an end in between leaves tensors that nothing describes, never the reverse."""
        kept = storage.write_atomically

        def ended(path, content):
            if path.suffix == ".json":
                raise KeyboardInterrupt
            return kept(path, content)

        monkeypatch.setattr(storage, "write_atomically", ended)
        path = tmp_path / "net.safetensors"
        with pytest.raises(KeyboardInterrupt):
            mf.save_network(random_network(ARCH, (3, 2), 0), path)
        assert listed(tmp_path) == ["net.safetensors"]
        with pytest.raises(FileNotFoundError, match=r"net.json does not exist; it describes the architecture"):
            mf.load_network(path)


class TestBadFiles:
    def test_paths(self, saved):
        path, network = saved
        for call in (mf.load_network, storage.load_tensors, lambda path: mf.save_network(network, path)):
            with pytest.raises(ValueError, match=r"path='.*net.pt' must end in .safetensors"):
                call(path.with_suffix(".pt"))
        with pytest.raises(FileNotFoundError, match=r"none.json does not exist"):
            mf.load_network(path.with_name("none.safetensors"))
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"net.safetensors does not exist"):
            mf.load_network(path)
        with pytest.raises(FileNotFoundError, match=r"network.json does not exist"):
            mf.load_network(path.parent)

    def test_every_truncation_of_the_tensors_is_named(self, saved):
        path, _ = saved
        whole = path.read_bytes()
        for length in range(0, len(whole), 23):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"net.safetensors is not a safetensors file, perhaps truncated"):
                mf.load_network(path)

    def test_every_truncation_of_the_description_is_named(self, saved):
        path, _ = saved
        description = path.with_suffix(".json")
        whole = description.read_bytes()
        for length in range(0, len(whole) - 2, 7):  # the last byte but one closes the object
            description.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"net.json is not JSON, perhaps truncated"):
                mf.load_network(path)

    @pytest.mark.parametrize("content", [b"hello", b"\x80\x02cos\nsystem\n", bytes(64)])
    def test_files_of_another_kind(self, saved, content):
        path, _ = saved
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"net.safetensors is not a safetensors file"):
            mf.load_network(path)

    @pytest.mark.parametrize(
        "change",
        [lambda d: [d], lambda d: {**d, "format": "meanfield network 2"}, lambda d: {**d, "architecture": None}],
    )
    def test_descriptions_of_something_else(self, saved, change):
        path, _ = saved
        description = path.with_suffix(".json")
        description.write_text(json.dumps(change(json.loads(description.read_text()))))
        with pytest.raises(ValueError, match=r"net.json does not describe a network: expected a JSON object with"):
            mf.load_network(path)

    def test_a_description_of_another_network(self, saved):
        path, _ = saved
        for layers, message in (
            (ARCH.layers[:1], r"net.safetensors holds the tensors .* its description net.json needs .*readout"),
            ((*ARCH.layers, mf.Conv(1)), r"holds the tensors .* needs .*'kernels.2'"),
            ((mf.Conv(2), mf.Conv(2)), r"holds the tensors .*'biases.0'"),
            ((mf.Conv(3, bias=True), mf.Conv(2)), r"net.safetensors does not fit its description: .*kernels\[0\]"),
        ):
            other = mf.Architecture((1, 4, 4), layers, outputs=2)
            description = path.with_suffix(".json")
            content = json.loads(description.read_text()) | {"architecture": other.to_dict()}
            description.write_text(json.dumps(content))
            with pytest.raises(ValueError, match=message):
                mf.load_network(path)

    def test_tensors_of_another_network(self, saved):
        path, network = saved
        other = random_network(ARCH, (4, 2), 1)
        for name, tensor in (
            ("masses.0", other.masses[0]),
            ("readout", normal((3, 2), 0)),
            ("kernels.1", network.kernels[0]),
        ):
            tensors = storage.load_tensors(mf.save_network(network, path))
            storage.save_tensors(tensors | {name: tensor}, path)
            with pytest.raises(ValueError, match=r"net.safetensors does not fit its description"):
                mf.load_network(path)
        storage.save_tensors({"weight": torch.ones(3)}, path)
        with pytest.raises(ValueError, match=r"holds the tensors \['weight'\]"):
            mf.load_network(path)
