"""Signals that ask for an end: when they raise, when they wait, and what is said of them."""

import os
import signal
import time
import weakref

import pytest

from meanfield.bench import signals
from meanfield.bench.command import one_line_errors

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_each_is_an_interrupt_with_its_own_exit_code(name, code, capsys):
    """SIGTERM and SIGHUP used to end a command on the spot."""
    before = [signal.getsignal(number) for number in signals.ENDING]
    with pytest.raises(SystemExit) as ended, one_line_errors():
        send(getattr(signal, name))
    assert ended.value.code == code
    named = "Ctrl-C" if name == "SIGINT" else name
    assert capsys.readouterr().err == f"stopped by {named}\n"
    assert [signal.getsignal(number) for number in signals.ENDING] == before


def test_one_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.heard():
            send(signal.SIGHUP)
            assert not signals.came()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_waits_for_a_look_and_the_second_does_not():
    with signals.heard(), signals.waiting():
        signals.look()
        send(signal.SIGTERM)
        assert signals.came()
        with pytest.raises(signals.Stopped):
            signals.look()
        send(signal.SIGINT)  # the work is on its way out
        send(signal.SIGINT)
        assert signals.came()
    with signals.heard(), signals.waiting():
        send(signal.SIGTERM)
        with pytest.raises(signals.Stopped):
            send(signal.SIGTERM)


def test_while_they_are_held_they_wait_however_many_come():
    with signals.heard():
        with signals.held():
            for _ in range(3):
                send(signal.SIGINT)
        assert signals.came()
        with pytest.raises(signals.Stopped):
            signals.look()
        with pytest.raises(signals.Stopped), signals.imports():
            assert not send(signal.SIGINT)


def test_an_error_that_a_stop_ended_in_is_that_stop():
    """In the middle of an import a stop has come out as a RecursionError of numpy."""

    def broken_off():
        try:
            send(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RecursionError from None

    with signals.heard(), pytest.raises(signals.Stopped), signals.surely():
        broken_off()
    with signals.heard(), pytest.raises(RecursionError), signals.surely():
        raise RecursionError


def test_one_that_python_ignores_comes_again():
    """What is raised in the callback of a weak reference goes nowhere."""

    class Gone:
        pass

    held = [Gone()]
    reference = weakref.ref(held[0], lambda _: signal.raise_signal(signal.SIGTERM))
    with signals.heard():
        held.clear()
        with pytest.raises(signals.Stopped, match="SIGTERM"):
            time.sleep(20)
    assert reference() is None
