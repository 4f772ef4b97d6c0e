"""One dialect of commands: how a command line is read, what is refused in one line, how a study is run from it."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter

from meanfield import __version__, limits
from meanfield.bench import signals
from meanfield.bench.options import (
    FLAT,
    OUTPUT,
    WORK,
    Jobs,
    Out,
    Overwrite,
    Quiet,
    Seed,
    Settings,
    flag,
    option,
    spelled,
)
from meanfield.validation import Misuse, one_of

if TYPE_CHECKING:
    from meanfield.bench.study import Study

MISUSE, FAULT, SHORT, UNREAD = 2, 70, 75, 141  # exit codes: an option, this library, memory or disk, a reader gone
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
BACKENDS = {"loky": None, "threading": None, "dask": "distributed", "ray": "ray"}  # -> the package that it needs


def available(value: Any, argument: str) -> str:
    """Where joblib runs cells; one whose package is there."""
    package = BACKENDS[one_of(value, argument, BACKENDS)]
    if package is not None and importlib.util.find_spec(package) is None:
        raise Misuse(argument, value, f"needs the package {package}, which is not installed: pip install {package}")
    return value


def application(name: str, text: str) -> App:
    return App(
        name=name,
        help=text,
        version=f"{name.split()[-1]} {__version__}",
        default_parameter=Parameter(negative_iterable=()),
    )


def register(app: App, name: str, package: ModuleType, *, complete: bool) -> None:
    """The command of a study's package; without `complete` its name and first line only, which cost no import.

    package: its first line of documentation says what the command does; its module `command` has the function
    command(options: a subclass of Settings) and, for a study of parts, STUDY.
    """
    if not complete:
        app.command(lambda: None, name=name, help=str(package.__doc__).splitlines()[0])
        return
    module = importlib.import_module(f"{package.__name__}.command")
    text, study = inspect.getdoc(module.command) or "", getattr(module, "STUDY", None)
    if study is not None:
        text += f"\n\nParts: {', '.join(study.parts)}. Sizes: {', '.join(study.sizes)}."
    app.command(_flat(module.command), name=name, help=text)


def single(name: str, command: Callable[[Any], None]) -> App:
    """The application whose one command is command(options: a subclass of Settings), with its documentation."""
    app = application(name, inspect.getdoc(command) or "")
    app.default(_flat(command))
    for word in (*app.help_flags, *app.version_flags):
        app[word].show = False  # cyclopts lists them as commands, and there are none
    return app


def _flat(command: Callable[[Any], None]) -> Callable[..., None]:
    """The command with every field of its settings as an option."""
    kind = typing.get_type_hints(command)["options"]

    # inherited fields are annotated in the words of their own modules
    kind.__init__.__annotations__ = typing.get_type_hints(kind, include_extras=True)

    def run(options: Settings = kind()) -> None:  # noqa: B008 - frozen
        command(options)

    run.__annotations__["options"] = Annotated[kind, FLAT]
    return run


def launch(name: str, text: str, home: ModuleType, arguments: Sequence[str] | None = None) -> None:
    """The entry point of a program whose commands are the packages in `home`, each as `register` wants it.

    Heavy imports wait until a command is asked for.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    with one_line_errors():
        app = application(name, text)
        with signals.imports():
            for found in sorted(each.name for each in pkgutil.iter_modules(home.__path__) if each.ispkg):
                package = importlib.import_module(f"{home.__name__}.{found}")
                called = getattr(package, "COMMAND", found)
                register(app, called, package, complete=[called] == words[:1])
        main(app, words)


def main(app: App, arguments: Sequence[str] | None = None) -> Any:
    """Read a command line and do what it says; what is refused is told in one line, with exit code 2."""
    with one_line_errors():
        command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
        done = command(*bound.args, **bound.kwargs)
        sys.stdout.flush()
        return done


@contextmanager
def one_line_errors() -> Iterator[None]:
    """The end of a program that was stopped, that refuses or that has no room; its warnings are one line each as well.

    A fault of the library itself comes with its traceback, and an exit code that means nothing else.
    """
    with signals.heard(), warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            with signals.surely():
                yield
        except KeyboardInterrupt:
            stop(f"stopped by {signals.last()}", signals.exit_code())
        except Misuse as error:
            refuse(_told(error))
        except BrokenPipeError:  # the reader has what it wanted, as `head` does; no misuse
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(UNREAD) from None
        except OSError as error:
            refuse(_named(error), SHORT if error.errno in NO_ROOM else MISUSE)
        except (CycloptsError, ValueError, ImportError) as error:
            short = error.__cause__ is not None and limits.is_shortage(error.__cause__)
            refuse(str(error), SHORT if short else MISUSE)
        except Exception as error:
            if limits.is_shortage(error):
                refuse("memory ran out; give it less at a time: fewer or smaller images, fewer particles", SHORT)
            if _lost(error):
                refuse(str(error), SHORT)
            traceback.print_exc()
            raise SystemExit(FAULT) from None


def _told(error: Misuse) -> str:
    value = repr(error.value) if isinstance(error.value, str) else spelled(error.value)
    bare = error.value is True or error.value is None  # a flag has no value, what is missing neither
    given = "" if bare else f"={value}"
    return f"--{error.argument.replace('_', '-')}{given} {error.remedy}"


def _named(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _lost(error: Exception) -> bool:
    """Whether a worker was, or another rank; without an import of their rooms, which bring torch."""
    rooms = [sys.modules.get(f"meanfield.{name}") for name in ("bench.workers", "ranks")]
    return any(room is not None and isinstance(error, room.Lost) for room in rooms)


def _warn(message: Warning | str, *_: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def refuse(text: str, code: int = MISUSE) -> NoReturn:
    stop(f"error: {' '.join(text.split())}", code)


def stop(text: str, code: int) -> NoReturn:
    with signals.held():
        print(text, file=sys.stderr, flush=True)
        signals.ignored_at_exit()
        raise SystemExit(code)


def interrupted(out: Path | None, folders: Iterable[str]) -> NoReturn:
    """The end of a command after a signal; folders: those of `out` in which finished work is kept."""
    if out is None or not any((out / folder).exists() for folder in folders):
        stop("stopped before there was anything to keep", signals.exit_code())
    stop(f"stopped; what was finished is in {out}, and the same command goes on from there", signals.exit_code())


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Settings):
    """What every study can be asked for."""

    part: Annotated[
        tuple[str, ...], option("Only this part; may be given again. Without it: all.", WORK, show_default=False)
    ] = ()
    size: Annotated[str, option("How much of everything: quick shows that it runs.", WORK)] = "default"
    seed: Seed = 0
    jobs: Jobs = 2
    backend: Annotated[
        str,
        option(
            "Where joblib runs them: loky (processes of this machine), threading, dask or ray; the last two need "
            "their packages and, for a cluster, a connected client.",
            WORK,
        ),
        available,
    ] = "loky"
    out: Out = None
    overwrite: Overwrite = False
    report: Annotated[
        bool, flag("Write the page and its pictures, as by default, or leave them.", OUTPUT, "--no-report")
    ] = True
    quiet: Quiet = False


def run_study(study: Study, options: StudyOptions, subject: Any, *program: str) -> Path | None:
    """Measure what is asked for, under a bar of progress, and write the tables and the page; returns the page.

    What is finished is kept: the same command goes on where it was stopped.
    """
    from meanfield.bench.provenance import Provenance
    from meanfield.bench.reading import refuse_inside
    from meanfield.storage.results import opened

    sizes = study.sizes[one_of(options.size, "size", study.sizes)]
    plan = study.plan(subject, sizes, options.seed, options.part)
    if not plan:
        raise Misuse("part", options.part, f"has nothing to measure at --size={options.size}; take a larger one")
    study.check(subject, plan)
    out = options.out or Path("runs") / study.name
    if data := options.to_dict().get("data"):
        refuse_inside(out, data)
    made = Provenance(options.command_line(*program), options.to_dict(), data=study.data(subject))
    work = {"seed": options.seed, "parts": options.part, "jobs": options.jobs, "backend": options.backend}
    with opened(out, study.name, study.names(), study.folders(), overwrite=options.overwrite) as result:
        say_data(made.data, options.quiet)
        try:
            with signals.surely():
                with counted(sum(map(len, plan.values())), options.quiet) as announce:
                    tables = study.run(subject, sizes, out, announce=lambda part, _, kept: announce(part, kept), **work)
                files = study.files(tables, made, report=options.report)
            with signals.held():
                result.publish(files)
        except KeyboardInterrupt:
            interrupted(out, study.folders())
    print(f"tables: {', '.join(f'{part}.csv' for part in tables)} in {out}")
    if not options.report:
        return None
    print(f"page: {out / study.page_name}")
    return out / study.page_name


def say_data(read: str, quiet: bool) -> None:
    """Before the work: what it will be about."""
    if read and not quiet:
        print(f"data: {read}", file=sys.stderr)


@contextmanager
def counted(total: int, quiet: bool) -> Iterator[Callable[[str, bool], None]]:
    """A bar of progress over cells, moved on by announce(description, kept), which this hands out; at the end it says
    how many were there already.
    """
    kept = []
    with progress(quiet) as bars:
        bar = bars.add_task("cells", total=total)

        def announce(description: str, known: bool) -> None:
            kept.append(known)
            bars.update(bar, advance=1, description=description)

        yield announce
    if sum(kept):
        print(f"{sum(kept)} of {total} cells were there already", file=sys.stderr)


def progress(quiet: bool = False) -> Any:
    """Bars on the error stream: what is done, time spent and left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=quiet)
