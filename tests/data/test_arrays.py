"""What arrays mean: range, axes, labels, keys.  What is ambiguous is refused with the words that settle it."""

import re
import warnings

import numpy as np
import pytest
import torch
from image_files import write

from meanfield import data
from meanfield.validation import Misuse

LABELS = np.array([0, 1, 0, 1])


def steps(*values, dtype=np.float64):
    """4 images of 2 x 2 pixels that hold these values."""
    return np.resize(np.array(values, dtype=dtype), (4, 2, 2))


def loaded(source, **options):
    """The data, and what was warned of."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = data.load(source, **options)
    assert len(heard) <= 1
    said = str(heard[0].message) if heard else ""
    assert said.count("\n") == 0
    return found, said


class TestRange:
    """(values, what they become, what is said of it)"""

    @pytest.mark.parametrize(
        ("images", "scale", "said"),
        [
            (steps(0, 0.5, 1), 1, ""),
            (steps(0, 0.5, 1, dtype=np.float16), 1, ""),
            (steps(0, 1, 0, 0), 1, ""),  # fractions, all of them whole
            (steps(False, True, False, dtype=bool), 1, ""),
            (steps(0, 3, 255, dtype=np.uint8), 255, ""),
            (steps(0, 3, 255, dtype=">i8"), 255, ""),
            (steps(0, 3, 255, dtype=np.float32), 255, ""),
            (steps(0, 3, 16, dtype=np.uint8), 16, "range=0..16 is assumed"),
            (steps(0, 3, 16), 16, "range=0..16 is assumed"),
            (steps(0, 3, 100, dtype=np.uint8), 255, "no value above 100: range=0..255 is assumed"),
            (steps(0, 0.01, 0.003), 1, "very dark, or divided twice"),
        ],
    )
    def test_ranges_that_the_values_single_out(self, tmp_path, images, scale, said):
        found, heard = loaded(write(tmp_path / "images.npz", x=images, y=LABELS))
        np.testing.assert_allclose(found.inputs[:, 0].numpy(), images.astype(float) / scale, rtol=1e-12, atol=0)
        assert said in heard
        assert bool(said) == bool(heard)
        assert (f"divided by {scale}" if scale > 1 else "as they are") in found.summary

    @pytest.mark.parametrize("outside", [1e-7, -1e-7])
    def test_rounding_of_fractions_is_cut_off_and_said(self, tmp_path, outside):
        images = steps(0, 0.5, 1 + max(0, outside), min(0, outside))
        found, heard = loaded(write(tmp_path / "a.npz", x=images, y=LABELS))
        assert (float(found.inputs.min()), float(found.inputs.max())) == (0, 1)
        assert "values up to 1e-07 outside 0..1 cut off, as rounding" in heard

    @pytest.mark.parametrize(
        ("images", "message", "settled", "becomes"),
        [
            (steps(0, 1, dtype=np.uint8), r"0..1 or range=0..255", "0..1", 1),
            (steps(0, 1, dtype=np.int64), r"0..1 or range=0..255", "0..255", 255),
            (steps(0, 7, dtype=np.int64), r"0..15 or range=0..255", "0..15", 15),
            (steps(0, 1000, dtype=np.uint16), "range=0..4095", "0..4095", 4095),
            (steps(0, 65535, dtype=np.uint16), "range=0..65535", "0..65535", 65535),
            (steps(0, 1.5), r"lie in 0..1.5; expected 0..1 \(say", "0..1.5", 1.5),
            (steps(0, 254.7), r"range=0..255", "0..255", 255),
        ],
    )
    def test_ambiguous_ranges_are_refused_until_they_are_said(self, tmp_path, images, message, settled, becomes):
        path = write(tmp_path / "images.npz", x=images, y=LABELS)
        with pytest.raises(ValueError, match=rf"images.npz: .*images .*{message}"):
            data.load(path)
        found, heard = loaded(f"{path}:range={settled}")
        np.testing.assert_allclose(found.inputs[:, 0].numpy(), images / becomes, rtol=1e-12)
        assert not heard

    @pytest.mark.parametrize(
        ("images", "advice"),
        [
            (steps(0, 1.001), "0..2"),
            (steps(0, 0.5, 1.99), "0..2"),
            (steps(-3.3, 0.5, 3.1), "-4..4"),
            (steps(-128, 127, dtype=np.int8), "-128..127"),
            (steps(-300, 5, dtype=np.int16), "-512..511"),
            (steps(0, 1e300), "LOW..HIGH"),
        ],
    )
    def test_the_range_that_a_refusal_names_holds_the_images_closely(self, tmp_path, images, advice):
        """Fractions up to 1.001 were advised to take 0..15, which makes them nearly black."""
        path = write(tmp_path / "a.npz", x=images, y=LABELS)
        with pytest.raises(ValueError, match=f"as range={re.escape(advice)}, or rescale"):
            data.load(path)
        if advice != "LOW..HIGH":
            data.load(f"{path}:range={advice}")

    def test_negative_values(self, tmp_path):
        path = write(tmp_path / "a.npz", x=steps(-1, 0, 1), y=LABELS)
        with pytest.raises(ValueError, match=r"lie in -1..1; expected 0..1 .*range=-1..1"):
            data.load(path)
        np.testing.assert_array_equal(data.load(f"{path}:range=-1..1").inputs[:, 0], (steps(-1, 0, 1) + 1) / 2)
        with pytest.raises(Misuse, match=r"range='0..1' does not hold the images of .*a.npz, which lie in -1..1"):
            data.load(f"{path}:range=0..1")
        for wrong in ("1..0", "0..nan", "0-1", "0..", "0..inf", "-1e308..1e308"):
            with pytest.raises(Misuse, match=rf"range='{wrong}' must be LOW..HIGH"):
                data.load(f"{path}:range={wrong}")

    def test_black_images_are_refused_and_equal_ones_said(self, tmp_path):
        with pytest.raises(ValueError, match=r"data=.*a.npz. has 4 selected images that are black"):
            data.load(write(tmp_path / "a.npz", x=steps(0), y=LABELS))
        found = data.load(write(tmp_path / "a.npz", x=steps(0.5), y=LABELS))
        assert found.summary.endswith("all selected images are the same")


class TestAxes:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_the_last_axis_is_that_of_the_channels_where_nothing_else_can_be_meant(self, tmp_path, rng, channels):
        images = rng.random((4, 5, 6, channels))
        found, heard = loaded(write(tmp_path / "a.npz", x=images, y=LABELS))
        np.testing.assert_array_equal(found.inputs.numpy(), np.moveaxis(images, -1, 1))
        assert "the last axis read as that of the channels" in heard
        found, heard = loaded(write(tmp_path / "a.npz", x=np.moveaxis(images, -1, 1), y=LABELS))
        np.testing.assert_array_equal(found.inputs.numpy(), np.moveaxis(images, -1, 1))
        assert not heard

    @pytest.mark.parametrize("shape", [(4, 3, 4, 3), (4, 1, 2, 3), (4, 3, 1, 1), (4, 5, 6, 4), (4, 4, 5, 6)])
    def test_ambiguous_channels_are_refused_until_they_are_said(self, tmp_path, rng, shape):
        images = rng.random(shape)
        path = write(tmp_path / "a.npz", x=images, y=LABELS)
        with pytest.raises(ValueError, match=r"a.npz: images have shape .*; say axes=NCHW or axes=NHWC"):
            data.load(path)
        np.testing.assert_array_equal(data.load(f"{path}:axes=NCHW").inputs, images)
        np.testing.assert_array_equal(data.load(f"{path}:axes=NHWC").inputs, np.moveaxis(images, -1, 1))

    def test_single_pixels_are_the_same_either_way(self, tmp_path, rng):
        assert data.load(write(tmp_path / "a.npz", x=rng.random((4, 1, 1, 1)), y=LABELS)).input_shape == (1, 1, 1)

    def test_any_order_can_be_said(self, tmp_path, rng):
        images = rng.random((5, 6, 3, 4))  # as MATLAB stores them
        found = data.load(f"{write(tmp_path / 'a.npz', x=images, y=LABELS)}:axes=HWCN")
        np.testing.assert_array_equal(found.inputs, images.transpose(3, 2, 0, 1))
        for wrong in ("NHW", "NCHH", "N", "NXYC"):
            with pytest.raises(Misuse, match=f"axes='{wrong}'"):
                data.load(f"{tmp_path / 'a.npz'}:axes={wrong}")

    @pytest.mark.parametrize("shape", [(4, 784, 1), (4, 1, 784), (4, 1, 1, 49), (4, 49, 1, 1), (4, 20, 3)])
    def test_no_images_have_such_sides(self, tmp_path, rng, shape):
        path = write(tmp_path / "a.npz", x=rng.random(shape), y=LABELS)
        with pytest.raises(ValueError, match=r"images have shape .*, which would be [0-9]+ x [0-9]+ pixels"):
            data.load(path)
        axes = "NHW" if len(shape) == 3 else "NCHW"
        assert data.load(f"{path}:axes={axes}").inputs.numel() == np.prod(shape)

    def test_rows_are_square_images(self, tmp_path, rng):
        images = rng.random((4, 5, 5))
        found, heard = loaded(write(tmp_path / "a.npz", x=images.reshape(4, 25), y=LABELS))
        np.testing.assert_array_equal(found.inputs[:, 0], images)
        assert "rows of 25 values read as 5 x 5 pixels" in heard
        for columns in (4, 9, 24, 75):
            with pytest.raises(ValueError, match=r"expected \(N, H, W\) or \(N, C, H, W\), or rows that are square"):
                data.load(write(tmp_path / "a.npz", x=rng.random((4, columns)), y=LABELS))


class TestLabels:
    @pytest.mark.parametrize(
        "labels",
        [
            LABELS[:, None],
            LABELS.astype(float),
            LABELS.astype(bool),
            LABELS.astype(np.uint64),
            LABELS.astype(">i4"),
            LABELS.astype(str),
        ],
    )
    def test_forms(self, tmp_path, rng, labels):
        found = data.load(write(tmp_path / "a.npz", x=rng.random((4, 2, 2)), y=labels))
        assert found.labels.tolist() == LABELS.tolist()

    @pytest.mark.parametrize(
        ("labels", "bad"),
        [
            (LABELS * 1e30, r"1e\+30"),
            (LABELS * -1e30, r"-1e\+30"),
            (LABELS * np.longdouble("1e30"), r"1e\+30"),
            (LABELS.astype(np.uint64) + np.uint64(2**63), "9223372036854775808"),
            (np.array([0, np.nan, 0, 1]), "nan"),
            (LABELS * 0.5, "0.5"),
        ],
    )
    def test_what_int64_does_not_hold_is_named(self, tmp_path, rng, labels, bad):
        with pytest.raises(ValueError, match=rf"a.npz: labels contain {bad}; labels are classes and must be integers"):
            data.load(write(tmp_path / "a.npz", x=rng.random((4, 2, 2)), y=labels))

    @pytest.mark.parametrize("dtype", [str, "S"])
    def test_text_names_the_classes(self, tmp_path, rng, dtype):
        images = rng.random((4, 2, 2))
        path = write(tmp_path / "a.npz", x=images, y=np.array(["zebra", "ant", "bee", "zebra"]).astype(dtype))
        found = data.load(path)
        assert (found.labels.tolist(), found.class_names) == ([2, 0, 1, 2], ("ant", "bee", "zebra"))
        chosen = data.load(path, classes=("zebra", "ant"))
        assert (chosen.class_names, chosen.classes) == (("zebra", "ant"), (2, 0))
        assert chosen.targets("squared").tolist() == [1, -1, 1]
        assert "classes zebra (2), ant (1)" in chosen.summary
        with pytest.raises(Misuse, match=r"contains cat, not a class of a.npz, which has ant, bee, zebra"):
            data.load(path, classes=("zebra", "cat"))

    def test_names_beside_integer_labels(self, tmp_path, rng):
        contents = {"data": rng.random((4, 16)), "target": LABELS, "target_names": np.array(["no", "yes"])}
        found, _ = loaded(write(tmp_path / "a.npz", **contents), classes=("yes", "no"))
        assert (found.classes, found.class_names) == ((1, 0), ("yes", "no"))

    @pytest.mark.parametrize("names", [np.array([b"no", b"yes"]), np.array(["no", "yes", "perhaps"])])
    def test_names_of_classes_in_other_forms(self, tmp_path, rng, names):
        path = write(tmp_path / "a.npz", x=rng.random((4, 4, 4)), y=LABELS, class_names=names)
        assert data.load(path).class_names == ("no", "yes")

    @pytest.mark.parametrize("names", [["no", "no"], [["no", "yes"]]])
    def test_names_that_do_not_tell_classes_apart_are_refused(self, tmp_path, rng, names):
        path = write(tmp_path / "a.npz", x=rng.random((4, 4, 4)), y=LABELS, class_names=np.array(names))
        with pytest.raises(ValueError, match=r"a.npz: 'class_names' must be a row of names, a different one"):
            data.load(path)

    @pytest.mark.parametrize(("labels", "said"), [(LABELS + 1, r"1\.\.2"), (2 * LABELS - 1, r"-1\.\.1")])
    def test_names_that_fit_no_label_are_said_to_be_left_out(self, tmp_path, rng, labels, said):
        """Labels from 1 lost their names in silence."""
        path = write(tmp_path / "a.npz", x=rng.random((4, 4, 4)), y=labels, class_names=np.array(["no", "yes"]))
        with pytest.warns(data.DataWarning, match=rf"2 names of classes left out: the labels {said} are not 0\.\.1"):
            found = data.load(path)
        assert set(found.class_names) == set(map(str, labels.tolist()))

    @pytest.mark.parametrize("blank", ["", " "])
    def test_a_blank_label_is_no_class(self, tmp_path, rng, blank):
        path = write(tmp_path / "a.npz", x=rng.random((4, 4, 4)), y=np.array(["ant", blank, "ant", "bee"]))
        with pytest.raises(ValueError, match=rf"a.npz: labels contain '{blank}', which names no class"):
            data.load(path)

    def test_a_name_that_is_the_place_of_another_class(self, tmp_path, rng):
        path = write(tmp_path / "a.npz", x=rng.random((4, 2, 2)), y=np.array(["1", "x", "1", "x"]))  # places 0 and 1
        with pytest.raises(Misuse, match=r"classes=1 is the name of one class of a.npz and the place of another"):
            data.load(path, classes=(1, 0))


class TestKeys:
    @pytest.mark.parametrize(
        ("images", "labels"), [("x_{}", "y_{}"), ("X_{}", "y_{}"), ("{}_images", "{}_labels"), ("{}_x", "{}_y")]
    )
    def test_splits(self, tmp_path, rng, images, labels):
        parts = {split: rng.random((4, 2, 2)) for split in ("train", "test")}
        contents = {images.format(split): part for split, part in parts.items()}
        path = write(tmp_path / "a.npz", **contents, **{labels.format(split): LABELS[:, None] for split in parts})
        for split, part in parts.items():
            found, heard = loaded(path, split=split)
            np.testing.assert_array_equal(found.inputs[:, 0], part)
            assert not heard
            np.testing.assert_array_equal(data.load(f"{path}:split={split}").inputs[:, 0], part)
        found, heard = loaded(path)
        np.testing.assert_array_equal(found.inputs[:, 0], parts["train"])
        assert "split train of the file; left out: test, which split=test takes" in heard
        with pytest.raises(Misuse, match=r"split='val' is not in .*a.npz, which has train and test"):
            data.load(path, split="val")
        with pytest.raises(Misuse, match=r"split='test' contradicts '.*a.npz:split=train'"):
            data.load(f"{path}:split=train", split="test")

    def test_splits_without_train_must_be_said(self, tmp_path, rng):
        contents = {
            f"{what}_{split}": rng.random((4, 2, 2)) if what == "x" else LABELS
            for what in "xy"
            for split in ("test", "val")
        }
        with pytest.raises(Misuse, match=r"which images of .*a.npz to read: test or val"):
            data.load(write(tmp_path / "a.npz", **contents))

    def test_a_split_is_not_taken_in_silence_for_others_without_a_partner(self, tmp_path, rng):
        """x, y_train, x_test and y_test used to be read as the test images, without a word."""
        images, path = rng.random((4, 2, 2)), tmp_path / "a.npz"
        tested = {"x_test": images, "y_test": LABELS}
        with pytest.raises(Misuse, match=r"which images of .*a.npz to read: test; 'x', 'y_train' has no partner"):
            data.load(write(path, x=images, y_train=LABELS, **tested))
        _, heard = loaded(write(path, **tested))
        assert "split test of the file" in heard
        _, heard = loaded(write(path, x_train=images, y_train=LABELS, x_test=images))
        assert "split train of the file; left out: 'x_test', without a partner" in heard

    def test_one_image_and_one_label_are_customary_as_well(self, tmp_path, rng):
        images, path = rng.random((4, 2, 2)), tmp_path / "a.npz"
        np.testing.assert_array_equal(data.load(write(path, image=images, label=LABELS)).inputs[:, 0], images)
        with pytest.raises(ValueError, match=r"has labels under 'y' and others under 'label'"):
            data.load(write(path, x=images, y=LABELS, label=1 - LABELS))

    def test_keys_can_be_named(self, tmp_path, rng):
        images = rng.random((2, 4, 2, 2))
        path = write(tmp_path / "a.npz", x=images[0], y=LABELS, photos=images[1], kinds=1 - LABELS)
        found = data.load(f"{path}:images=photos,labels=kinds")
        np.testing.assert_array_equal(found.inputs[:, 0], images[1])
        assert found.labels.tolist() == [1, 0, 1, 0]
        np.testing.assert_array_equal(data.load(f"{path}:images=photos").inputs[:, 0], images[1])
        for wrong, message in (
            ("image=photos", "data='image' is unknown.* did you mean 'images'"),
            ("images=photos,images=x", "must say images= once"),
            ("images=", "must say images= once, with a value"),
            ("images=foto", "has no images: expected the key 'foto', found 'x', 'y', 'photos', 'kinds'"),
        ):
            with pytest.raises(ValueError, match=message):
                data.load(f"{path}:{wrong}")

    def test_two_keys_that_may_be_meant(self, tmp_path, rng):
        """scikit-learn's bunch has its images twice; others are not the same."""
        images = rng.random((4, 4, 4))
        path = write(tmp_path / "a.npz", data=images.reshape(4, 16), images=images, target=LABELS)
        assert data.load(path).input_shape == (1, 4, 4)
        write(path, x=images, images=images[::-1], y=LABELS)
        with pytest.raises(
            ValueError, match=r"has images under 'x' and others under 'images'; say which, as .*images=x"
        ):
            data.load(path)
        write(path, x=images, y=LABELS, targets=1 - LABELS)
        with pytest.raises(ValueError, match=r"has labels under 'targets' and others under 'y'"):
            data.load(path)

    def test_what_does_not_concern_a_source_is_refused(self, folder):
        for source, name in (
            ("digits:axes=NHWC", "axes"),
            (f"{folder}:images=x", "images"),
            ("mnist:range=0..1", "range"),
        ):
            with pytest.raises(Misuse, match=rf"{name}='.*' .*holds no arrays, leave it out"):
                data.load(source)

    def test_a_path_with_a_colon_is_a_path(self, tmp_path, rng):
        images = rng.random((4, 2, 2))
        path = write(tmp_path / "a:images=b.npz", x=images, y=LABELS)
        np.testing.assert_array_equal(data.load(str(path)).inputs[:, 0], images)
        assert data.stamp(f"{path}:images=x") == path.stat().st_mtime_ns


class TestOrder:
    def test_a_sorted_file_is_taken_one_of_every_class_in_turn(self, tmp_path, rng):
        """The first 101 used to be 100 of one class and 1 of the other, the first 16 of one class alone."""
        images = rng.random((200, 2, 2))
        path = write(tmp_path / "a.npz", x=images, y=np.repeat([3, 5], 100))
        found, heard = loaded(path, samples=101)
        assert found.labels.bincount().tolist()[3::2] == [51, 50]
        assert "classes lie apart: one of every class in turn" in heard
        assert "classes lie apart" in found.summary
        np.testing.assert_array_equal(found.inputs[:4, 0], images[[0, 100, 1, 101]])
        every = torch.cat([found.inputs, found.rest.inputs])
        torch.testing.assert_close(every.sort(0).values[:, 0], torch.from_numpy(images).sort(0).values, rtol=0, atol=0)

    def test_a_file_sorted_in_pieces_and_a_rare_class(self, tmp_path, rng):
        images = rng.random((200, 2, 2))
        pieces = np.concatenate([np.repeat([0, 1], 80), np.repeat([0, 1], 20)])
        rare = np.zeros(200, int)
        rare[[150, 180]] = 1
        for labels in (pieces, rare):
            found, heard = loaded(write(tmp_path / "a.npz", x=images, y=labels), samples=4)
            assert found.labels.tolist() == [0, 1, 0, 1]
            assert "one of every class in turn" in heard

    def test_a_mixed_file_stays_in_its_order(self, tmp_path, rng):
        images, labels = rng.random((200, 2, 2)), rng.integers(0, 2, 200)
        found, heard = loaded(write(tmp_path / "a.npz", x=images, y=labels), samples=50)
        np.testing.assert_array_equal(found.inputs[:, 0], images[:50])
        assert not heard

    def test_a_drawn_selection_misses_no_class_either(self, tmp_path, rng):
        labels = np.zeros(100, int)
        labels[3] = 1
        path = write(tmp_path / "a.npz", x=rng.random((100, 2, 2)), y=labels)
        for seed in range(5):
            assert loaded(path, samples=4, seed=seed)[0].labels.sort().values.tolist() == [0, 0, 0, 1]
