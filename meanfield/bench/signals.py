"""Signals that ask a command to end: Ctrl-C, SIGTERM of a scheduler, SIGHUP of a terminal that is gone.

All three are one `Stopped`, a KeyboardInterrupt, so that whoever keeps work after Ctrl-C keeps it after the others.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
AGAIN = 0.01  # seconds until a stop that Python ignored is sent once more


class Stopped(KeyboardInterrupt):
    """A signal asked for an end."""


@dataclass
class _Heard:
    """Of this process: which signal came last, whether it is yet to be acted on, whether any was, who makes it wait."""

    number: int = int(signal.SIGINT)
    unheeded: bool = False
    acted: bool = False
    waiting: int = 0
    held: int = 0


_heard = _Heard()


@contextmanager
def heard() -> Iterator[None]:
    """From now on the signals raise `Stopped`.  One that is ignored, as SIGHUP is under nohup, stays ignored; Ctrl-C
    is heard where a shell has put the command into the background as well.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    known = {number: signal.getsignal(number) for number in ENDING}
    taken = [number for number in ENDING if number == signal.SIGINT or known[number] is not signal.SIG_IGN]
    _heard.number, _heard.unheeded, _heard.acted = int(signal.SIGINT), False, False
    hook = sys.unraisablehook
    try:
        sys.unraisablehook = partial(_sent_again, hook)
        for number in taken:
            signal.signal(number, _hear)
        yield
    finally:
        for number in taken:
            signal.signal(number, known[number])
        sys.unraisablehook = hook


@contextmanager
def waiting() -> Iterator[None]:
    """The first signal waits until the work looks, see `look`; a second one before that raises at once.  After either
    the work is on its way out, and further ones wait.
    """
    _heard.waiting, _heard.acted = _heard.waiting + 1, False
    try:
        yield
    finally:
        _heard.waiting, _heard.acted = _heard.waiting - 1, False


@contextmanager
def held() -> Iterator[None]:
    """Signals wait, however many come: for what has to be done as a whole and takes a moment."""
    _heard.held += 1
    try:
        yield
    finally:
        _heard.held -= 1


@contextmanager
def imports() -> Iterator[None]:
    """For imports: broken off in the middle, modules are left in pieces, and the signal is lost in other errors."""
    with held():
        yield
    look()


@contextmanager
def surely() -> Iterator[None]:
    """An error that a stop ended in, on its way through somebody's `except`, is that stop."""
    try:
        yield
    except Exception as error:
        if _heard.acted:
            raise Stopped(last()) from error
        raise


def came() -> bool:
    """Whether a signal waits to be acted on."""
    return _heard.unheeded


def look() -> None:
    """Raise `Stopped` if a signal waits."""
    if _heard.unheeded:
        _stop()


def last() -> str:
    """What asked for the end, in words."""
    return "Ctrl-C" if _heard.number == signal.SIGINT else signal.Signals(_heard.number).name


def exit_code() -> int:
    """What a shell says of a process that this signal ended."""
    return 128 + _heard.number


def ignored_at_exit() -> None:
    """The process is ending: a signal on the way only adds noise to what was said."""
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in ENDING])


def _hear(number: int, frame: object) -> None:
    again, _heard.unheeded, _heard.number = _heard.unheeded, True, number
    raises = again and not _heard.acted if _heard.waiting else True
    if raises and not _heard.held:
        _stop()


def _sent_again(hook: Callable[[sys.UnraisableHookArgs], object], ignored: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised in a destructor or the callback of a weak reference, as the import of a module has
    them: a stop that hit one comes again, when it is over.
    """
    if isinstance(ignored.exc_value, Stopped):
        threading.Timer(AGAIN, os.kill, (os.getpid(), _heard.number)).start()
    else:
        hook(ignored)


def _stop() -> None:
    _heard.unheeded, _heard.acted = False, True
    raise Stopped(last())
