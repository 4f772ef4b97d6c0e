"""Folders of images: order, modes, kinds of files, and a clear error for every kind of bad folder."""

import os

import numpy as np
import pytest
import torch
from image_files import grey, save
from PIL import Image
from sklearn.datasets import load_digits

from meanfield import data, limits
from meanfield.data import folders, image_files


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
        with pytest.warns(data.DataWarning, match="left out: 1 .txt, 1 beside the class folders, 3 hidden"):
            found = data.load(folder)
        assert self.values(found) == [10, 20, 11, 21, 12, 30]
        assert "3 hidden" in found.summary

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
        save(tmp_path / "cat" / "1.png", grey(9))
        with pytest.raises(
            ValueError, match=r"data='.*test_one_class0' has images of one class only, cat; at least two"
        ):
            data.load(tmp_path)

    def test_one_integer_twice(self, tmp_path):
        for name in ("1", "01"):
            save(tmp_path / name / "1.png", grey(1))
        with pytest.raises(ValueError, match=r"the class folders '01', '1' name one integer twice"):
            data.load(tmp_path)

    def test_label_key(self, folder):
        with pytest.raises(ValueError, match=r"labels='parity' names a key of a file; '.*pets' has labels of its own"):
            data.load(folder, labels="parity")

    @pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "ppm", "tif", "webp"])
    def test_a_truncated_image_is_a_named_error_unless_no_pixel_is_lost(self, folder, rng, suffix):
        path = save(folder / "dog" / f"whole.{suffix}", rng.integers(0, 256, (3, 4, 3)))
        whole, pixels = path.read_bytes(), image_files.decode([path])[0]
        errors: list[str] = []
        for length in range(0, len(whole), 5):
            path.write_bytes(whole[:length])
            try:
                np.testing.assert_array_equal(image_files.decode([path])[0], pixels)
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


class TestOtherLayouts:
    """Folders that mean something else than a class each used to be read as classes."""

    def nested(self, top, *folders):
        for number, name in enumerate(folders):
            for index in range(2):
                save(top / name / f"{index}.png", grey(40 * number + 10 + index))
        return top

    @pytest.mark.parametrize("above", ["", "photos/", "photos/2020/"])
    def test_splits_of_class_folders_are_refused_with_advice(self, tmp_path, above):
        names = [f"{above}{split}/{name}" for split in ("train", "val") for name in ("ant", "zebra")]
        self.nested(tmp_path, *names)
        with pytest.raises(ValueError, match=rf"say --data .*/{above}train or --data .*/{above}val, otherwise move"):
            data.load(tmp_path)
        assert data.load(tmp_path / above / "train", classes=("zebra", "ant")).class_names == ("zebra", "ant")

    def test_one_split_beside_classes_and_splits_with_images_of_their_own(self, tmp_path):
        self.nested(tmp_path / "a", "ant", "zebra", "val/ant", "val/zebra")
        with pytest.raises(ValueError, match=r"the class folder 'val' holds no images but .*say --data .*a/val, "):
            data.load(tmp_path / "a")
        self.nested(tmp_path / "b", "train", "train/ant", "val", "val/ant")
        with pytest.raises(
            ValueError, match=r"hold a folder 'ant' of images; .*say --data .*b/train or --data .*b/val"
        ):
            data.load(tmp_path / "b")

    @pytest.mark.parametrize("names", [("train", "test"), ("Train", "valid", "test"), ("train/ant", "train", "val")])
    def test_parts_of_a_data_set_are_no_classes(self, tmp_path, names):
        """Images without class folders, in train/ and val/, were learned as the classes train and val."""
        self.nested(tmp_path, *names)
        with pytest.raises(ValueError, match=r"named as parts of a data set, not as classes"):
            data.load(tmp_path)

    def test_a_class_may_be_called_train(self, tmp_path):
        assert data.load(self.nested(tmp_path, "bus", "train")).class_names == ("bus", "train")

    def test_images_in_folders_inside_a_class_are_said(self, tmp_path):
        self.nested(tmp_path, "ant", "ant/red", "bee")
        with pytest.warns(data.DataWarning, match=r"2 images in folders inside class folders"):
            assert len(data.load(tmp_path)) == 6

    def test_dark_bytes_are_said(self, tmp_path):
        for name, value in {"a": 3, "b": 20}.items():
            save(tmp_path / name / "1.png", grey(0) * 0 + value)
        assert "no value above 20 of 255" in data.load(tmp_path).summary

    def test_kinds_that_are_not_read_and_links_are_counted_and_said(self, folder, tmp_path):
        for name in ("1.gif", "2.GIF", "3.heic", ".DS_Store"):
            (folder / "dog" / name).write_bytes(b"")
        (folder / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
        save(tmp_path / "elsewhere" / "9.png", grey(99))
        (folder / "cat" / "more").symlink_to(tmp_path / "elsewhere")
        (folder / "cat" / "other").mkdir()
        (folder / "cat" / "other" / "loop").symlink_to(folder)
        message = r"pets: left out: 2 .gif, 1 .heic, 1 broken link, 1 hidden, 2 linked folder inside a class folder$"
        with pytest.warns(data.DataWarning, match=message):
            found = data.load(folder)
        assert len(found) == 5
        assert "left out: 2 .gif" in found.summary

    def test_a_rotation_that_is_noted_is_said(self, folder):
        turned = Image.Exif()
        turned[0x0112] = 6
        Image.fromarray(grey(50).astype(np.uint8)).save(folder / "dog" / "7.jpg", exif=turned)
        with pytest.warns(data.DataWarning, match="a rotation noted in 1 not applied"):
            data.load(folder)

    def test_files_that_are_no_images_are_said_without_a_warning(self, folder):
        (folder / "labels.csv").write_text("")
        assert data.load(folder).summary.endswith("left out: 1 .csv")

    def test_linked_class_folders_and_images_are_read(self, folder, tmp_path):
        linked = tmp_path / "linked"
        linked.mkdir()
        (linked / "ant").symlink_to(folder / "cat")
        (linked / "bee").mkdir()
        (linked / "bee" / "1.png").symlink_to(folder / "dog" / "0.png")
        assert data.load(linked).labels.tolist() == [0, 1, 0, 0]

    def test_one_file_under_two_classes_is_refused(self, folder):
        (folder / "dog" / "3.png").symlink_to(folder / "cat" / "0.png")
        with pytest.raises(ValueError, match=r"cat/0.png and .*dog/3.png are one file under two classes"):
            data.load(folder)
        (folder / "dog" / "3.png").unlink()
        (folder / "emu").symlink_to(folder / "dog")
        with pytest.raises(ValueError, match=r"dog/0.png and .*emu/0.png are one file under two classes"):
            data.load(folder)

    def test_nearly_black_bytes_are_refused_until_their_range_is_said(self, tmp_path):
        """Masks of 0 and 1 used to become 0 and 0.0039."""
        for name in "ab":
            save(tmp_path / name / "1.png", np.eye(4))
        with pytest.raises(ValueError, match=r"whole numbers in 0..1, .*say range=0..1 or range=0..255"):
            data.load(tmp_path)
        np.testing.assert_array_equal(data.load(f"{tmp_path}:range=0..1").inputs[0, 0], np.eye(4))

    def test_the_root_of_all_files_is_refused_at_once(self, tmp_path, monkeypatch):
        """--data / walked everything there is."""
        for name in ("bin", "etc"):
            (tmp_path / name).mkdir()
        deep = tmp_path / "bin"
        for level in range(60):
            deep = deep / str(level)
            for twig in range(3):
                (deep / f"t{twig}").mkdir(parents=True)
        monkeypatch.setattr(folders, "MOST_SEARCHED", 20)
        seen, listed = [], folders.Path.iterdir
        monkeypatch.setattr(folders.Path, "iterdir", lambda path: (seen.append(path), listed(path))[1])
        with pytest.raises(ValueError, match="holds no images"):
            data.load(tmp_path)
        assert len(seen) < 60
        monkeypatch.setattr(folders, "MOST_NESTED", 20)
        for name in ("bin", "etc"):
            save(tmp_path / name / "1.png", grey(50))
        with pytest.raises(
            ValueError, match="more than 20 folders and images lie in folders inside the class folder 'bin'"
        ):
            data.load(tmp_path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
    def test_a_pipe_under_the_name_of_an_image_is_left_out(self, folder):
        os.mkfifo(folder / "dog" / "pipe.png")
        with pytest.warns(data.DataWarning, match="1 no regular file"):
            assert len(data.load(folder)) == 5


class TestMemory:
    def test_images_that_do_not_fit_are_no_damaged_ones(self, folder, monkeypatch):
        monkeypatch.setattr(limits, "free_memory", lambda _: 30)  # bytes; an image has 12
        with pytest.raises(
            ValueError, match=r"5 images of grey of shape \(1, 3, 4\), such as .*would take 0.0 MB of mem"
        ):
            data.load(folder)
        monkeypatch.setattr(limits, "free_memory", lambda _: 200)
        with pytest.raises(ValueError, match=r"pets: 5 images as numbers would take .* give fewer or smaller"):
            data.load(folder)
        monkeypatch.setattr(limits, "free_memory", lambda _: 10**9)

        def fail(*_):
            raise MemoryError

        monkeypatch.setattr(Image.Image, "convert", fail)
        with pytest.raises(ValueError, match=r"memory ran out over 5 images such as .*cat/0.png") as caught:
            data.load(folder)
        assert "damaged" not in str(caught.value)

    def test_torch_running_out_is_the_same(self, folder, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(torch.nn.functional, "avg_pool2d", fail)
        for name in ("cat", "dog"):
            for file in (folder / name).iterdir():
                save(file, grey(50 if name == "cat" else 60, (4, 4)))
        with pytest.raises(ValueError, match=r"memory ran out over .*pets"):
            data.load(folder, pool=2)

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
    def test_an_image_that_may_not_be_read_is_no_damaged_one(self, folder):
        (folder / "cat" / "0.png").chmod(0)
        with pytest.raises(ValueError, match=r"0.png cannot be read"):
            data.load(folder)
