"""Folders of images, one per class."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
# no other decoder of Pillow is tried, whatever the suffix says
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")
IMAGE_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}  # mode of the file -> 8-bit grey or colour


def class_folders(path: Path) -> list[Path]:
    return sorted(
        (entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")),
        key=lambda entry: entry.name,
    )


def image_files(folder: Path) -> list[Path]:
    """Images at any depth, nothing hidden, in alphabetical order."""
    found = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def folder_labels(names: tuple[str, ...], path: Path) -> tuple[int, ...]:
    """The names as integers where all are (of at most 18 digits, so that int64 holds them),
    otherwise their positions.
    """
    if not all(re.fullmatch("-?[0-9]{1,18}", name) for name in names):
        return tuple(range(len(names)))
    labels = tuple(int(name) for name in names)
    if len(set(labels)) < len(labels):
        raise ValueError(
            f"{path}: the class folders {', '.join(map(repr, names))} name one integer twice; rename or merge them"
        )
    return labels


def decode(files: Sequence[Path]) -> np.ndarray:
    """Pixels (N, H, W, C) uint8 of images that share size and mode."""
    from PIL.Image import DecompressionBombWarning  # matplotlib installs Pillow

    with warnings.catch_warnings():
        warnings.simplefilter("error", DecompressionBombWarning)  # Pillow only warns of images up to twice its limit
        first = _decode_one(files[0])
        pixels = np.empty((len(files), *first.shape), dtype=np.uint8)
        for row, file in enumerate(files):
            image = _decode_one(file)
            if image.shape != first.shape:
                raise ValueError(
                    f"images must share one size and mode: {files[0]} is {_described(first)}, {file} is "
                    f"{_described(image)}; resize or convert them"
                )
            pixels[row] = image
    return pixels


def _decode_one(file: Path) -> np.ndarray:
    """(H, W, C) uint8."""
    from PIL import Image

    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            mode, frames = image.mode, getattr(image, "n_frames", 1)
            plain = mode in IMAGE_MODES and "transparency" not in image.info and frames == 1
            pixels = np.asarray(image.convert(IMAGE_MODES[mode])) if plain else None
    except Exception as error:  # as in _archive
        kind = (
            "too large to be decoded safely"
            if type(error).__name__.startswith("DecompressionBomb")
            else "a damaged image or no image"
        )
        raise ValueError(f"{file} is {kind} ({error})") from error
    if pixels is None:
        what = f"{frames} frames" if frames > 1 else f"mode {mode!r}" if mode not in IMAGE_MODES else "transparency"
        raise ValueError(
            f"{file} has {what}; images must be one frame of 8-bit grey or RGB without transparency, convert it"
        )
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _described(pixels: np.ndarray) -> str:
    height, width, channels = pixels.shape
    return f"{'grey' if channels == 1 else 'colour'} of shape {(channels, height, width)}"
