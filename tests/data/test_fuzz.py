"""Hostile files for every loader: a Dataset that holds, or one line that names the file or the argument.

A loader is one entry of LOADERS: a function that writes something into a directory from a random generator, and
returns what `data.load` is to be given and, where it is known, what is in it.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
import psutil
import torch
from image_files import write
from PIL import Image

from meanfield import data
from meanfield.data import address, arrays, readers
from meanfield.data.source import printable

CASES = 2000
GROWTH = 200e6  # bytes of memory, over all cases
DTYPES = ("u1", "i1", "<u2", ">i4", "<i8", "<u8", "<f2", "<f4", ">f8", "?", "<c8", "<U3", "S2", "O", "<M8[s]")
TOPS = (0, 0.003, 1, 1 + 1e-7, 1.5, 7, 16, 100, 255, 256, 65535, 1e30)
KEYS = (("x", "y"), ("X", "Y"), ("data", "target"), ("x_train", "y_train"), ("test_images", "test_labels"), ("a", "b"))
NAMES = ("ant", "zebra", "1", "01", "-7", "train", ".x", "a b", "ü$x$", "x\ny")
RANGES = {  # as summaries say them
    "as they are": (0, 1),
    "divided by 16": (0, 16),
    "divided by 255": (0, 255),
    "divided by 300": (0, 300),
    "-1..1 as 0..1": (-1, 1),
}


@dataclass
class Given:
    """images, labels: in the order of the file, where they are whole."""

    source: object
    images: np.ndarray | None = None
    labels: np.ndarray | None = None
    options: dict | None = None


def images_of(rng, count):
    """Arrays of many shapes, types and ranges, half of them images."""
    plain = rng.random() < 0.5
    shapes = [(5, 5), (3, 4, 4), (4, 4, 3), (25,), (1, 5, 5), (5, 5, 1), (4, 6), (3, 3, 3), (2, 9, 9), (), (0, 4)]
    values = rng.random((count, *shapes[rng.integers(5 if plain else len(shapes))]))
    values = values * rng.choice([1, 16, 255] if plain else TOPS)
    if values.size and values.max() > 1.5 and (plain or rng.random() < 0.5):
        values = values.round()
        values.flat[0] = rng.choice([values.max(), 16, 255])
    if not plain and values.size:
        values -= rng.choice([0, 0, 1e-9, 0.5])
        values.flat[rng.integers(values.size)] = rng.choice([0, 1, np.nan, np.inf, -np.inf])
    return as_type(values, rng.choice(["<f8", "<f4", "<i8"] if plain and values.max() > 1 else ["<f8", *DTYPES]))


def labels_of(rng, count):
    plain = rng.random() < 0.6
    labels = rng.integers(0, rng.choice([2, 3] if plain else [1, 2, 300]), count)
    labels = labels * rng.choice([1, -1] if plain else [1, 2**62, 1e30, 0.5])
    labels = np.sort(labels) if rng.random() < 0.3 else labels
    labels = labels[:, None] if rng.random() < 0.2 else labels
    return as_type(labels, rng.choice(["<i8", "<f8", "<i2"] if plain else ["<u8", "<U9", *DTYPES]))


def as_type(values, dtype):
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return values.astype(dtype)


def npz(place, rng):
    count = int(rng.integers(1, 30))
    images, labels = images_of(rng, count), labels_of(rng, max(1, count + int(rng.choice([0] * 12 + [1, -1]))))
    keys = [
        ("x", "y"),
        ("X", "Y"),
        ("data", "target"),
        ("x_train", "y_train"),
        ("test_images", "test_labels"),
        ("a", "b"),
    ]
    first, second = keys[rng.integers(len(keys))]
    path = write(place / "f.npz", **{first: images, second: labels})
    if rng.random() < 0.3:
        return Given(damaged(path, rng))
    said = ["", "", "", ":axes=NHWC", ":axes=NCHW", ":axes=NWH", ":range=0..300", ":range=-1..1", ":split=test"]
    return Given(f"{path}{rng.choice(said)}", images, labels)


def npy(place, rng):
    path = place / "f.npy"
    np.save(path, images_of(rng, 5))
    return Given(damaged(path, rng))


def directory(place, rng):
    top, names = (
        place / "d",
        rng.choice(["ant", "zebra", "1", "01", "-7", "train", ".x", "a b", "ü$x$", "x\ny"], 3, replace=False),
    )
    kinds = rng.choice([0.0, 0.1])
    for name in names[: rng.integers(1, 4)]:
        for number in range(rng.integers(0, 5)):
            folder = top / name / rng.choice(["", "", "", "in"], p=[0.4, 0.3, 0.28, 0.02])
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{number}{rng.choice(['.png', '.png', '.png', '.bmp', '.ppm', '.txt', '.gif'])}"
            mode = rng.choice(["L", "RGB", "RGBA", "I;16", "P", "1"]) if rng.random() < kinds else "L"
            Image.new(str(mode), (4, 3), int(rng.integers(0, 2 ** rng.integers(1, 9)))).save(file, "PNG")
            if rng.random() < 0.05:
                damaged(file, rng)
    return Given(top if rng.random() < 0.9 else f"{top}:range=0..255")


def cifar(place, rng):
    files = {"data_batch_1.bin": 2, "data_batch_2.bin": 1, "data_batch_3.bin": 1, "data_batch_4.bin": 1}
    files |= {"data_batch_5.bin": 2, "test_batch.bin": 2}
    labels = []
    for name, count in files.items():
        marks = rng.integers(0, 10 if rng.random() < 0.97 else 256, count)
        labels += marks.tolist()
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        (place / name).write_bytes(np.column_stack([marks.astype(np.uint8), pixels]).tobytes())
    if rng.random() < 0.5:
        damaged(place / rng.choice(list(files)), rng)
        return Given(place)
    return Given(place, labels=np.array(labels))


def named(name, place, rng):
    options = {
        "classes": pick(rng, [None, (3, 5), ("3", "5")], [(3, 11), (3,), "35", (3, None), (10**30, 1), (3, 3), ()]),
        "samples": pick(rng, [None, 4, 16], [1, 0, -3, 10**9, 2.5, True, "4"]),
        "pool": pick(rng, [1, 2], [3, 0, 10**9, 1.5, None]),
        "seed": pick(rng, [None, 0, 2**63], [-1, 2**70, "x", 1.0]),
        "split": pick(rng, [None], ["train", ""]),
    }
    return Given(f"{name}{rng.choice(['', '', '', ':range=0..1', ':', ':=', ':axes'])}", options=options)


def pick(rng, good, bad):
    choices = good if rng.random() < 0.85 else bad
    return choices[rng.integers(len(choices))]


LOADERS = {
    "npz": npz,
    "npy": npy,
    "directory": directory,
    "cifar": cifar,
    "digits": partial(named, "digits"),
    "mnist": partial(named, "mnist"),
}


def damaged(path, rng):
    """A file cut, changed or lengthened."""
    content = bytearray(path.read_bytes())
    how = rng.integers(3)
    if how == 0:
        content = content[: rng.integers(len(content) + 1)]
    elif how == 1:
        for _ in range(rng.integers(1, 8)):
            content[rng.integers(len(content))] = rng.integers(256)
    else:
        at = rng.integers(len(content) + 1)
        content[at:at] = rng.bytes(rng.integers(1, 5000))
    path.write_bytes(content)
    return path


def outcome(given):
    """The Dataset and what was said of it, or the text of the error."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            found = data.load(given.source, **(given.options or {}))
        except (ValueError, FileNotFoundError) as error:  # whatever else there is fails the test
            return str(error)
    assert all(each.category is data.DataWarning for each in heard)
    return found


def check_error(text, given):
    assert text.count("\n") == 0
    assert 10 < len(text) < 1500
    arguments = ("data", "classes", "samples", "pool", "seed", "split", "range", "axes")
    named = (printable(str(given.source).split(":")[0]), *(f"{each}=" for each in arguments), "share one size and mode")
    assert any(each in text for each in named), text


def check_data(found, given):
    parts = [found] if found.rest is None else [found, found.rest]
    for part in parts:
        assert part.inputs.dtype == torch.float64
        assert part.labels.dtype == torch.int64
        assert part.inputs.ndim == 4
        assert len(part.labels) == len(part.inputs)
        assert bool(part.inputs.isfinite().all())
        assert part.inputs.min() >= 0
        assert part.inputs.max() <= 1
        assert set(part.labels.tolist()) <= set(found.classes)
    assert len(found.labels.unique()) >= 2
    assert len(found.class_names) == len(found.classes)
    assert found.summary.count("\n") == 0
    assert f"{len(found)} images of {' x '.join(map(str, found.input_shape))}" in found.summary
    if given.labels is not None:
        check_nothing_lost(found, given)


def check_nothing_lost(found, given):
    """Every image is there, in the order of the file, as it was or as the summary says."""
    labels = given.labels.reshape(-1)
    assert len(found) == len(labels)
    text = labels.astype(str) if labels.dtype.kind in "US" else labels.astype(int).astype(str)
    assert [found.class_names[index] for index in found.indices] == text.tolist()
    if given.images is None:
        return
    images, source = given.images.astype(float), str(given.source)
    if images.ndim == 4 and ("axis read as" in found.summary or "axes=NHWC" in source):
        images = np.moveaxis(images, -1, 1)
    images = images.swapaxes(1, 2) if "axes=NWH" in source else images
    low, high = next(limits for words, limits in RANGES.items() if words in found.summary)
    expected = (images.reshape(found.inputs.shape) - low) / (high - low)
    slack = arrays.ROUNDING if "cut off" in found.summary else 1e-12
    np.testing.assert_allclose(found.inputs.numpy(), expected, rtol=0, atol=slack)


def test_no_file_does_more_than_give_images_or_one_line(tmp_path, monkeypatch):
    source = readers.read(address.Address("digits"))
    monkeypatch.setattr(readers, "_digits", lambda: source)
    monkeypatch.setattr(readers, "_mnist", lambda: source)
    before, ends = psutil.Process().memory_info().rss, {name: [0, 0] for name in LOADERS}
    for case, name in zip(range(CASES), cycle(LOADERS)):
        place = tmp_path / str(case)
        place.mkdir()
        given = LOADERS[name](place, np.random.default_rng(case))
        found = outcome(given)
        try:
            check_error(found, given) if isinstance(found, str) else check_data(found, given)
        except AssertionError as error:
            raise AssertionError(f"case {case} ({name}, {given.source!r}): {error}; {found}") from error
        ends[name][isinstance(found, str)] += 1
    assert psutil.Process().memory_info().rss - before < GROWTH
    assert all(refused > 20 for _, refused in ends.values()), ends
    assert all(read > 20 for name, (read, _) in ends.items() if name != "npy"), ends
