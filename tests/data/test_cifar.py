"""The binary files of CIFAR: bytes, order, labels, and a clear error for every kind of bad file."""

import numpy as np
import pytest
import torch
from PIL import Image

from meanfield import data

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


def test_a_folder_of_images_with_a_stray_binary_file_is_a_folder_of_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((3, 3), 7, np.uint8)).save(tmp_path / name / "1.png")
    (tmp_path / "test.bin").write_bytes(b"notes")
    assert len(data.load(tmp_path)) == 2
