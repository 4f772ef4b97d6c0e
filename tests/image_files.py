"""Files of images and arrays, written for tests of readers."""

import numpy as np
from PIL import Image


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path, **options)
    return path


def grey(value, shape=(3, 4)):
    return np.full(shape, value)
