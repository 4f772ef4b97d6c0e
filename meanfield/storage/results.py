"""A result: files of one run in a folder, which change together or not at all.

New files are written into a hidden folder beside the old ones, which then gets a second name: from that rename on the
new result counts.  Its files move into place, what only the older result had goes, and last comes the manifest, which
has the checksum of every file.  A process that is killed before the rename leaves the older result as it was; after it,
whoever opens the folder next completes the move, and `read` finds the new files until then.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from meanfield.storage import files, locks
from meanfield.validation import Misuse

FORMAT = "meanfield result 1"
MANIFEST = ".manifest.json"
OTHERWISE = "give another directory, or --overwrite to replace it"


class Result:
    """The result `name` of a directory, which may hold several: `name`.manifest.json lists its files."""

    def __init__(self, directory: str | Path, name: str) -> None:
        self.directory, self.name = Path(directory), name
        self.manifest = f"{name}{MANIFEST}"
        self._written, self._decided = (self.directory / f".{name}.{stage}" for stage in ("part", "new"))

    def read(self, file: str) -> bytes:
        """The content of a file, whichever process replaces the result meanwhile.

        FileNotFoundError without it, ValueError where the manifest knows it otherwise, is damaged, or does not list it.
        """
        while True:
            known, content = self.listed(), self._content(file)
            if not known or known.get(file) == files.checksum(content):
                return content
            if self.listed() == known:
                raise ValueError(
                    f"{self.directory / file} does not fit {self.manifest} beside it: it was changed, or is of another "
                    "run"
                )

    def listed(self) -> dict[str, str]:
        """File -> checksum, from the manifest; {} without one.  ValueError where it is damaged."""
        try:
            return _listed(self._content(self.manifest), self.directory / self.manifest)
        except FileNotFoundError:
            return {}

    def faults(self) -> list[str]:
        """What is not as the manifest says: names of files that are missing or were changed."""
        return [file for file, known in self.listed().items() if not self._fits(file, known)]

    def _fits(self, file: str, known: str) -> bool:
        try:
            return files.checksum(self._content(file)) == known
        except (ValueError, OSError):
            return False

    def _content(self, file: str) -> bytes:
        try:
            return files.read(self._decided / file)
        except (FileNotFoundError, NotADirectoryError):  # none decided, or moved into its place already
            return files.read(self.directory / file)

    def publish(self, contents: Mapping[str, bytes | str]) -> None:
        """Put these files (name -> content) in the place of the older result of this name.  For one process at a time,
        see `opened`.
        """
        self.finish()
        shutil.rmtree(self._written, ignore_errors=True)  # of a process that was killed
        try:
            self._written.mkdir()
            for file, content in contents.items():
                with files.naming(self.directory / file):
                    files.write_new(self._written / file, content)
            listed = {file: files.checksum(content) for file, content in contents.items()}
            text = files.to_json({"format": FORMAT, "result": self.name, "files": listed})
            with files.naming(self.directory / self.manifest):
                files.write_new(self._written / self.manifest, text)
            _sync(self._written)
            self._written.rename(self._decided)
        except BaseException:
            shutil.rmtree(self._written, ignore_errors=True)
            raise
        _sync(self.directory)
        self.finish()

    def finish(self) -> None:
        """Complete a change that was decided, whoever began it; may be called again after an end at any moment."""
        if not os.path.lexists(self._decided):
            return
        self._refuse_odd(self._decided)
        waiting = self._decided / self.manifest
        if waiting.exists():
            new = _listed(files.read(waiting), waiting)
            gone = [file for file in self._older() if file not in new]
            for file in new:
                if (self._decided / file).exists():
                    os.replace(self._decided / file, self.directory / file)
            for file in gone:
                (self.directory / file).unlink(missing_ok=True)
            os.replace(waiting, self.directory / self.manifest)
            _sync(self.directory)
        self._decided.rmdir()

    def _refuse_odd(self, stage: Path) -> None:
        """What nobody who writes results leaves."""
        if os.path.lexists(stage) and (stage.is_symlink() or not stage.is_dir()):
            raise ValueError(f"{stage} is no directory")

    def check_stages(self) -> None:
        """Complete an older change; ValueError or OSError where what lies there was not left by one."""
        self._refuse_odd(self._written)
        self.finish()

    def _older(self) -> list[str]:
        """The files of the result in place that nobody has changed."""
        path = self.directory / self.manifest
        try:
            listed = _listed(files.read(path), path)
        except (ValueError, FileNotFoundError):
            return []
        return [file for file, known in listed.items() if _is(self.directory / file, known)]


@contextmanager
def opened(
    directory: str | Path,
    name: str,
    contents: Iterable[str] = (),
    folders: Iterable[str] = (),
    *,
    overwrite: bool = False,
) -> Iterator[Result]:
    """The result `name` of a directory, for this process alone; the directory is made, and removed if it stays empty.

    contents, folders: names that may be written.  Misuse of "out" where the directory cannot be written to, another
    process has it, or a name is taken by a file that no manifest lists as it is; such a file may be replaced with
    `overwrite`.
    """
    directory, made = Path(directory), []
    try:
        with _own(directory, made):
            result = Result(directory, name)
            _check_stages(result)
            _claim(result, contents, folders, overwrite)
            yield result
    finally:
        for each in reversed(made):
            with suppress(OSError):
                each.rmdir()


@contextmanager
def _own(directory: Path, made: list[Path]) -> Iterator[None]:
    """Make the directory, adding to `made` what was not there, and hold its lock."""
    with ExitStack() as stack:
        try:
            made += [each for each in reversed([directory, *directory.parents]) if not each.exists()]
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.held(directory))
        except locks.Taken as error:
            text = f"is in use by another command ({error}); wait for it or give another directory"
            raise _unfit(directory, text) from None
        except OSError as error:
            text = "it is no directory" if directory.exists() and not directory.is_dir() else error.strerror
            raise _unfit(directory, f"cannot be written to ({text}); give a directory that you may write in") from None
        yield


def _check_stages(result: Result) -> None:
    """Before the work: `publish` could not write over them after it."""
    try:
        result.check_stages()
    except (ValueError, OSError) as error:
        text = f"has the remains of a change that cannot be completed ({error}); remove them or give another directory"
        raise _unfit(result.directory, text) from error


def _claim(result: Result, contents: Iterable[str], folders: Iterable[str], overwrite: bool) -> None:
    directory = result.directory
    try:
        ours = result.listed()
    except ValueError as error:
        if not overwrite:
            raise _unfit(directory, f"holds a damaged {result.manifest}; {OTHERWISE}") from error
        ours = {}
    for file in (result.manifest, *contents):
        path = directory / file
        if path.is_dir():
            raise _unfit(directory, f"cannot be used: {path} is a directory; give another one")
        known = file == result.manifest or (file in ours and _is(path, ours[file]))
        if os.path.lexists(path) and not known and not overwrite:
            raise _unfit(directory, f"holds {file}, which is no part of an earlier {result.name} there; {OTHERWISE}")
    for folder in folders:
        if os.path.lexists(directory / folder) and not (directory / folder).is_dir():
            raise _unfit(directory, f"cannot be used: {directory / folder} is no directory; give another one")


def _unfit(directory: Path, remedy: str) -> Misuse:
    return Misuse("out", str(directory), remedy)


def _listed(content: bytes, where: Path) -> dict[str, str]:
    """File -> checksum, of a manifest's content."""
    found = files.parse(content, where)
    listed = found.get("files") if isinstance(found, dict) and found.get("format") == FORMAT else None
    if not isinstance(listed, dict) or not all(map(_plain, listed.items())):
        raise ValueError(f'{where} is no manifest: expected "format": {FORMAT!r} and "files"')
    return listed


def _plain(entry: tuple[str, Any]) -> bool:
    """A manifest names files beside it, nothing elsewhere."""
    return Path(entry[0]).name == entry[0] and isinstance(entry[1], str)


def _is(path: Path, checksum: str) -> bool:
    try:
        return files.checksum(files.read(path)) == checksum
    except (ValueError, OSError):
        return False


def _sync(directory: Path) -> None:
    """The names in a directory, to the disk; where the system cannot, they are as safe as it makes them."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
