"""Image files to pixels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from meanfield.data.memory import afford, shortage_of
from meanfield.data.source import printable

# no other decoder of Pillow is tried, whatever the suffix says
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")
IMAGE_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}  # mode of the file -> 8-bit grey or colour
EXIF_ORIENTATION = 0x0112


def decode(files: Sequence[Path]) -> tuple[np.ndarray, int]:
    """Pixels (N, H, W, C) uint8 of images that share size and mode; how many of them note a rotation, which is not
    applied.
    """
    from PIL.Image import DecompressionBombWarning  # matplotlib installs Pillow

    with warnings.catch_warnings(), shortage_of(f"{len(files)} images such as {files[0]}"):
        warnings.simplefilter("ignore")  # of odd metadata
        warnings.simplefilter("error", DecompressionBombWarning)  # Pillow only warns of images up to twice its limit
        first, _ = _decode_one(files[0])
        afford(len(files) * first.size, f"{len(files)} images of {_described(first)}, such as {files[0]},")
        pixels, rotations = np.empty((len(files), *first.shape), dtype=np.uint8), 0
        for row, file in enumerate(files):
            image, rotated = _decode_one(file)
            if image.shape != first.shape:
                raise ValueError(
                    f"images must share one size and mode: {printable(files[0])} is {_described(first)}, "
                    f"{printable(file)} is {_described(image)}; resize or convert them"
                )
            pixels[row] = image
            rotations += rotated
    return pixels, rotations


def _decode_one(file: Path) -> tuple[np.ndarray, bool]:
    """(H, W, C) uint8; whether a rotation is noted."""
    from PIL import Image

    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            mode, frames = image.mode, getattr(image, "n_frames", 1)
            plain = mode in IMAGE_MODES and "transparency" not in image.info and frames == 1
            pixels = np.asarray(image.convert(IMAGE_MODES[mode])) if plain else None
            rotated = image.getexif().get(EXIF_ORIENTATION, 1) != 1
    except MemoryError:  # the file may be whole
        raise
    except Exception as error:  # whatever a damaged file does to the decoders, the message must name the file
        raise ValueError(f"{printable(file)} {_failure(error)} ({' '.join(str(error).split())})") from error
    if pixels is None:
        what = f"{frames} frames" if frames > 1 else f"mode {mode!r}" if mode not in IMAGE_MODES else "transparency"
        raise ValueError(
            f"{printable(file)} has {what}; images must be one frame of 8-bit grey or RGB without transparency, "
            "convert it"
        )
    return (pixels[:, :, None] if pixels.ndim == 2 else pixels), rotated


def _failure(error: Exception) -> str:
    if type(error).__name__.startswith("DecompressionBomb"):
        return "is too large to be decoded safely"
    system = isinstance(error, OSError) and error.errno is not None
    return "cannot be read" if system else "is a damaged image or no image"


def _described(pixels: np.ndarray) -> str:
    height, width, channels = pixels.shape
    return f"{'grey' if channels == 1 else 'colour'} of shape {(channels, height, width)}"
