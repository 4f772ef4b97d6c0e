"""Folders of images, one per class: what lies where, and what is passed over."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

from meanfield.data.keys import SPLITS
from meanfield.data.source import printable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
OTHER_IMAGES = (  # not read, and not passed over without a word
    *(".gif", ".jfif", ".jpe", ".jp2", ".heic", ".heif", ".avif", ".svg", ".ico", ".tga", ".pcx", ".psd", ".exr"),
    *(".hdr", ".dng", ".cr2", ".nef", ".raw", ".pbm", ".pnm", ".apng", ".npy", ".npz"),
)
MOST_NESTED = 100_000  # folders and images in folders inside a class folder; a mistaken --data=/ ends here
MOST_SEARCHED = 2_000  # entries in search of advice
HINTS = 3


@dataclass
class Survey:
    """images: class folder -> its images in alphabetical order; nested: how many of them lie in folders inside.
    left_out: what -> how many; any_image: among them something that looks like an image.
    """

    images: dict[str, list[Path]] = field(default_factory=dict[str, list[Path]])
    left_out: Counter[str] = field(default_factory=Counter[str])
    nested: int = 0
    any_image: bool = False

    def leave(self, file: Path, why: str) -> None:
        self.left_out[why] += 1
        self.any_image |= file.suffix.lower() in (*IMAGE_SUFFIXES, *OTHER_IMAGES) or file.is_symlink()


def class_folders(path: Path) -> list[Path]:
    return sorted((entry for entry in path.iterdir() if _is_visible_folder(entry)), key=lambda entry: entry.name)


def has_images(folder: Path) -> bool:
    """Directly in it."""
    return any(_is_image(file) for file in folder.iterdir())


def survey(path: Path) -> Survey:
    """Every folder in `path` as a class, with images directly in it; refused where that is not what the folders mean.

    Images in folders inside a class folder are of that class, where the class has others.
    """
    found = Survey()
    inside: dict[str, list[Path]] = {}
    for folder in class_folders(path):
        found.images[folder.name], inside[folder.name] = _parted(folder, found)
    _refuse_empty(path, found)
    for name, nested in inside.items():
        _descend(path, name, nested, found)
    _refuse_shared(path, found)
    _refuse_splits(path, list(found.images))
    _refuse_in_two_classes(path, found)
    for file in path.iterdir():
        if not _is_visible_folder(file):
            found.leave(file, "beside the class folders" if _is_image(file) else _kind(file))
    return found


def _is_visible_folder(entry: Path) -> bool:
    return not entry.name.startswith(".") and entry.is_dir()


def _is_image(file: Path) -> bool:
    return not file.name.startswith(".") and file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()


def _kind(file: Path) -> str:
    """Why a file is passed over."""
    if file.name.startswith("."):
        return "hidden"
    if not file.exists():
        return "broken link"
    if not file.is_file():
        return "no regular file"
    return printable(file.suffix.lower()) or "without a suffix"


def _parted(folder: Path, found: Survey) -> tuple[list[Path], list[Path]]:
    """Images and folders directly in a folder; what else is there is left out."""
    images: list[Path] = []
    folders: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if _is_image(entry):
            images.append(entry)
        elif not _is_visible_folder(entry):
            found.leave(entry, _kind(entry))
        elif entry.is_symlink():
            found.leave(entry, "linked folder inside a class folder")
        else:
            folders.append(entry)
    return images, folders


def _descend(path: Path, name: str, folders: list[Path], found: Survey) -> None:
    """Images at any depth, links not followed."""
    waiting, seen = deque(folders), 0
    while waiting:
        images, below = _parted(waiting.popleft(), found)
        found.images[name] += images
        found.nested += len(images)
        waiting.extend(below)
        seen += 1 + len(images)
        if seen > MOST_NESTED:
            raise ValueError(
                f"{path}: more than {MOST_NESTED:,} folders and images lie in folders inside the class folder "
                f"{printable(name)!r}; give the directory that holds one folder of images per class"
            )
    found.images[name].sort()


def _refuse_empty(path: Path, found: Survey) -> None:
    """Class folders without an image of their own: none at all, or the levels are others than they seem."""
    empty = [name for name, images in found.images.items() if not images]
    wanted = f"one folder per class, with files {', '.join(IMAGE_SUFFIXES)}"
    if found.images and not empty:
        return
    above = sorted({folder.parent for name in empty[:HINTS] for folder in _holding(path / name)})
    if above:
        raise ValueError(
            f"{path}: {_folders(empty)} no images but folders of images; if these are the classes, say "
            f"{' or '.join(f'--data {each}' for each in above[:HINTS])}, otherwise move the images up into the class "
            "folders"
        )
    if len(empty) == len(found.images):
        beside = "; those that lie directly in it have no class" if has_images(path) else ""
        raise ValueError(
            f"{path} holds no images; expected {path}/CLASS/*.png, {wanted}, or the binary files of CIFAR-10 "
            f"or CIFAR-100{beside}"
        )
    raise ValueError(
        f"{path}: the class folder {printable(empty[0])!r} holds no images; remove it or add files "
        f"{', '.join(IMAGE_SUFFIXES)}"
    )


def _refuse_splits(path: Path, names: list[str]) -> None:
    if len(names) > 1 and all(name.lower() in SPLITS for name in names):
        raise ValueError(
            f"{path}: the folders {', '.join(map(repr, names))} are named as parts of a data set, not as classes; give "
            "a directory with one folder of images per class, or rename them if they are classes"
        )


def _folders(names: list[str]) -> str:
    listed = ", ".join(repr(printable(name)) for name in names[:HINTS]) + (", ..." if len(names) > HINTS else "")
    return f"the class folder {listed} holds" if len(names) == 1 else f"the class folders {listed} hold"


def _holding(folder: Path) -> list[Path]:
    """Folders inside that hold images, as far as a short search finds them, links not followed."""
    waiting, seen = deque([folder]), 0
    found: list[Path] = []
    while waiting and seen < MOST_SEARCHED and len(found) < HINTS:
        try:
            entries = list(waiting.popleft().iterdir())
        except OSError:  # not ours to look into
            continue
        seen += len(entries) + 1
        below = [entry for entry in entries[:MOST_SEARCHED] if _is_visible_folder(entry) and not entry.is_symlink()]
        found += [entry for entry in below if _readable_with_images(entry)]
        waiting.extend(below)
    return found


def _readable_with_images(folder: Path) -> bool:
    try:
        return has_images(folder)
    except OSError:
        return False


def _refuse_shared(path: Path, found: Survey) -> None:
    """Class folders with images of their own that share names of folders inside are no classes but splits of them."""
    inside: dict[str, str] = {}
    for name, images in found.images.items():
        for below in {image.relative_to(path / name).parts[0] for image in images if image.parent != path / name}:
            if below in inside:
                first, second = (printable(path / each) for each in (inside[below], name))
                raise ValueError(
                    f"{path}: two of its folders hold a folder {printable(below)!r} of images; if that is a class, say "
                    f"--data {first} or --data {second}, otherwise move the images up into the class folders"
                )
            inside[below] = name


def _refuse_in_two_classes(path: Path, found: Survey) -> None:
    owners: dict[tuple[int, int], tuple[str, Path]] = {}
    for name, images in found.images.items():
        for image in images:
            known = image.stat()
            owner, first = owners.setdefault((known.st_dev, known.st_ino), (name, image))
            if owner != name:
                raise ValueError(
                    f"{path}: {printable(first)} and {printable(image)} are one file under two classes, by a link; "
                    "remove one"
                )
